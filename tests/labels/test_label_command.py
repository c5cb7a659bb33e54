"""``r1sae label``: what it prints, and that hostile labels do no harm."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from r1sae_fast.cli.main import app
from r1sae_fast.features import FeatureDB
from r1sae_fast.labels import Endpoint, LabelSettings, label_features
from r1sae_fast.labels.report import live

Server = Any  # conftest's
Behave = Callable[..., Any]
Run = Callable[..., Result]
SMALL = ("--explain", "10", "--test", "10", "--negatives", "10")


@pytest.fixture
def run(server: Server, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``r1sae label`` with the server in the environment, in a wide terminal."""
    monkeypatch.setenv("R1SAE_LABEL_URL", server.url)
    monkeypatch.setenv("R1SAE_LABEL_MODEL", "a-model")
    monkeypatch.setenv("R1SAE_LABEL_KEY", "sk-secret\n")  # as `$(cat key)` would not leave it

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["label", *map(str, arguments)], env={"COLUMNS": "200"})

    return run


def test_label(server: Server, run: Run, knowing: Behave, database: Path) -> None:
    server.behave = knowing
    dry = run(database, "--features", "1-3", *SMALL, "--dry-run", "--price-in", 1, "--price-out", 2)
    assert dry.exit_code == 0, dry.output
    assert "features     3 to label" in dry.output
    assert "requests     27, if every answer can be used\n" in dry.output
    assert "cost         about 0.0" in dry.output
    assert server.asked == []
    done = run(database, "--features", "1-3,12", *SMALL)
    assert done.exit_code == 0, done.output
    assert server.asked[0].headers["authorization"] == "Bearer sk-secret"
    assert "1.00 ±" in done.stdout
    assert "feature 3" in done.stdout
    assert "3 of 4 features labelled by a-model: 27 requests" in done.stderr
    assert "1 keep their counted label" in done.stderr
    again = run(database, "--features", "1-3", *SMALL)
    assert "0 of 0 features" in again.stderr
    assert "3 were labelled before (r1sae-label-1+" in again.stderr
    assert run(database, "--merge").output == f"0 labels merged into {database}\n"
    sampled = run(database, "--sample", 2, "--no-scores")
    assert "2 of 2 features labelled by a-model: 2 requests" in sampled.stderr


def test_a_cap(server: Server, run: Run, knowing: Behave, database: Path) -> None:
    server.behave = knowing
    prices = ("--price-in", 1, "--price-out", 1, "--max-tokens", 100)
    done = run(database, *SMALL, *prices, "--max-cost", 0.01)
    assert done.exit_code == 0
    assert "features to go: the next request could pass the cap (--max-cost)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{db}", "--features", "1-x"), "'1-x' is no feature"),
        (("{db}", "--features", "99"), "no feature 99"),
        (("{db}", "--features", "0-99999999999999"), "no feature 99999999999999"),
        (("{db}", "--features", "5-3"), "goes backwards"),
        (("{db}", "--price-in", "1"), "only one price"),
        (("{db}", "--max-cost", "1"), "prices"),
        (("{db}", "--explain", "7"), "multiples of quantiles"),
        (("{none}",), "no such file"),
        (("{none}", "--merge"), "no such file"),
    ],
)
def test_errors_are_one_line(
    run: Run, database: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*(a.format(db=database, none=database.with_name("none.ddb")) for a in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_no_endpoint(run: Run, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1SAE_LABEL_URL")
    result = run(database)
    assert result.exit_code == 1
    assert "R1SAE_LABEL_URL not set" in result.stderr
    assert "counted labels" in result.stderr
    with FeatureDB(database) as db:
        assert all(label.statistical for f in range(14) for label in db.labels(f))


def test_a_server_that_refuses(
    server: Server, run: Run, make_answer: Behave, database: Path
) -> None:
    server.behave = lambda asked: make_answer(
        status=401, raw=b'{"error": "\\u001b[31mwrong key sk-secret"}'
    )
    result = run(database)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "R1SAE_LABEL_KEY" in result.stderr
    assert "sk-secret" not in result.output
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "localhost:8000", "http://user:pw@host/v1", "http://host/v1?key=1", ""]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="R1SAE_LABEL_URL"):
        Endpoint(url, "m")


@pytest.mark.parametrize("url", ["http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"])
def test_urls(url: str) -> None:
    assert Endpoint(url, "m").chat_url == "http://h/v1/chat/completions"


def test_keys_that_are_none() -> None:
    with pytest.raises(ValueError, match="R1SAE_LABEL_KEY") as error:
        Endpoint("http://localhost/v1", "m", "sk-a\r\nx: y")
    assert "sk-a" not in str(error.value)
    assert "sk-a" not in repr(Endpoint("http://localhost/v1", "m", "sk-a"))


HOSTILE = (
    "\x1b]0;title\x07\x1b[31mred\x00 [bold]x[/bold] <script>alert(1)</script> \u202eevil '; DROP"
)


def test_hostile_labels(
    server: Server, run: Run, endpoint: Endpoint, make_answer: Behave, database: Path
) -> None:
    server.behave = lambda asked: make_answer(
        f"LABEL: {HOSTILE}" if asked.kind == "explain" else "[1, 0, 1, 0, 1]"
    )
    result = run(database, "--features", "1", *SMALL)
    assert result.exit_code == 0, result.output
    assert not any(c in result.output for c in "\x1b\x07\x00\u202e")
    assert "[bold]x[/bold]" in result.output
    with FeatureDB(database) as db:
        assert db.labels(1)[0].label == HOSTILE  # as given
        shown = io.StringIO()
        Console(file=shown, width=200).print(db.show(1))
        assert not any(c in shown.getvalue() for c in "\x1b\x07\x00\u202e")
        assert "[bold]x[/bold]" in shown.getvalue()
    # A scorer that answers no list of the right length leaves the figures out.
    server.behave = lambda asked: make_answer("LABEL: x" if asked.kind == "explain" else "[1, 0]")
    label_features(database, endpoint, LabelSettings(explain=10, test=10, negatives=10), [2])
    with FeatureDB(database) as db:
        for score in db.labels(2)[0].scores:
            assert (score.balanced_accuracy, score.f1, score.margin) == (None, None, None)
            assert score.unanswered == 20


@pytest.mark.parametrize(
    "bad", [{"text": ""}, {"text": "LABEL: cut", "finish": "length"}, {"text": "<think>LABEL: x"}]
)
def test_no_label(
    server: Server, run: Run, make_answer: Behave, database: Path, bad: dict[str, str]
) -> None:
    server.behave = lambda asked: make_answer(**bad)
    result = run(database, "--features", "1", *SMALL)
    assert "1 failed, feature 1 so: no line 'LABEL: ...' in any answer" in result.stderr
    assert len(server.asked) == 3
    assert [asked.body["temperature"] for asked in server.asked] == [0.0, 0.7, 0.7]
    # The answers were paid for: they are kept, and not asked for again.
    again = run(database, "--features", "1", *SMALL).stderr
    assert "1 failed" in again
    assert "--retry-failed" in again
    assert len(server.asked) == 3


def test_asked_again_where_no_answer_could_be_used(
    server: Server, run: Run, make_answer: Behave, knowing: Behave, database: Path
) -> None:
    bad = make_answer("I can't tell")
    server.behave = lambda asked: bad
    run(database, "--features", "1", *SMALL)
    assert len(server.asked) == 3
    retried = ("--features", "1", "--retry-failed", *SMALL)
    assert "1 failed" in run(database, *retried).stderr  # still none: three more are asked
    assert len(server.asked) == 6
    # The eighth answer is a label; a run that ends before the feature is done keeps it as well.
    server.behave = lambda asked: (
        bad if len(server.asked) < 8 else make_answer("LABEL: feature 1") if asked.kind == "explain"
        else make_answer(status=400)
    )  # fmt: skip
    run(database, *retried)
    before = len(server.asked)
    assert before > 8
    server.behave = knowing
    result = run(database, "--features", "1", *SMALL)
    assert "1 of 1 features labelled" in result.stderr
    assert "explain" not in {asked.kind for asked in server.asked[before:]}
    with FeatureDB(database) as db:
        assert db.labels(1)[0].label == "feature 1"
        usage = db.sql("SELECT requests FROM label_usage WHERE feature_id = 1").to_pylist()
    assert usage[0]["requests"] >= 8  # all that were paid for


def test_a_server_that_breaks_down(
    server: Server, run: Run, make_answer: Behave, knowing: Behave, database: Path
) -> None:
    server.behave = lambda asked: (
        knowing(asked) if len(server.asked) <= 20 else make_answer(status=400)
    )
    result = run(database, *SMALL, "--jobs", 1)
    assert result.exit_code == 1
    assert "5 features in a row failed; the last: " in result.stderr
    with FeatureDB(database) as db:
        assert db.labels(0)[0].label == "feature 0"


def test_the_live_line(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path, capfd: Any
) -> None:
    server.behave = knowing
    with live(shown=True) as watch:
        label_features(database, endpoint, LabelSettings(scorers=()), [1, 2], watch=watch)
    assert "2/2" in capfd.readouterr().err


def test_in_a_notebook(server: Server, endpoint: Endpoint, knowing: Behave, database: Path) -> None:
    """Called where a loop is running already."""
    import asyncio

    server.behave = knowing

    async def cell() -> int:
        return label_features(database, endpoint, LabelSettings(scorers=()), [1]).labelled

    assert asyncio.run(cell()) == 1
