"""What a plan counts is what is then asked, whatever an earlier run left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.labels import Endpoint, LabelSettings, label_features
from r1sae_fast.labels.journal import journal_path
from r1sae_fast.labels.plan import LabelPlan, plan_labels

Server = Any  # conftest's
Behave = Callable[..., Any]
SETTINGS = LabelSettings(explain=10, test=10, negatives=10)
ALL = 1 + 4 + 4  # requests of a feature


def planned(database: Path, retry_failed: bool, features: Any = (0, 1, 2, 3, 12)) -> LabelPlan:
    return plan_labels(database, SETTINGS, features, model="a-model", retry_failed=retry_failed)


def asked(server: Server, database: Path, endpoint: Endpoint, retry_failed: bool) -> int:
    """What a run asks whose every answer is usable."""
    before = len(server.asked)
    features = (0, 1, 2, 3, 12)
    label_features(database, endpoint, SETTINGS, features, jobs=1, retry_failed=retry_failed)
    return len(server.asked) - before


def refuse(server: Server, make_answer: Behave, knowing: Behave, kind: str) -> Behave:
    """The same behaviour, but nonsense in answer to requests of a kind."""
    return lambda a: make_answer("Hm.") if a.kind == kind else knowing(a)


@pytest.mark.parametrize("retry_failed", [False, True])
@pytest.mark.parametrize(
    ("nonsense", "left", "given_up"),
    [
        ("explain", {False: 0, True: 4 * ALL}, {False: 4, True: 0}),
        ("detection", {False: 0, True: 0}, {False: 0, True: 0}),  # a label without this score
    ],
)
def test_after_answers_that_could_not_be_used(
    server: Server,
    endpoint: Endpoint,
    make_answer: Behave,
    knowing: Behave,
    database: Path,
    nonsense: str,
    left: dict[bool, int],
    given_up: dict[bool, int],
    retry_failed: bool,
) -> None:
    server.behave = refuse(server, make_answer, knowing, nonsense)
    asked(server, database, endpoint, False)
    server.behave = knowing
    plan = planned(database, retry_failed)
    assert (plan.requests, plan.given_up) == (left[retry_failed], given_up[retry_failed])
    assert plan.exact
    assert plan.skipped == 1  # 12 is hardly ever active
    assert plan.features == plan.begun + 1 == (5 if nonsense == "explain" else 1)
    assert asked(server, database, endpoint, retry_failed) == plan.requests


@pytest.mark.parametrize("retry_failed", [False, True])
@pytest.mark.parametrize("answers", [3, ALL, ALL + 1, ALL + 6])
def test_after_a_server_that_broke_down(
    server: Server,
    endpoint: Endpoint,
    make_answer: Behave,
    knowing: Behave,
    database: Path,
    answers: int,
    retry_failed: bool,
) -> None:
    """What was answered, be it nonsense, is told from what was not."""

    def behave(a: Any) -> Any:
        if a.number >= answers:
            return make_answer(status=400)
        return make_answer("Hm.") if a.number == 2 else knowing(a)

    server.behave = behave
    asked(server, database, endpoint, False)
    server.behave = knowing
    before = journal_path(database).read_bytes() if journal_path(database).exists() else None
    plan = planned(database, retry_failed)
    if before is not None:
        assert journal_path(database).read_bytes() == before
    assert asked(server, database, endpoint, retry_failed) == plan.requests
    assert 0 < plan.requests < 4 * ALL


def test_a_plan_beside_a_run(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path
) -> None:
    """It takes no lock and cuts nothing, be the last line half written."""
    journal = journal_path(database)
    found: list[tuple[LabelPlan, bytes, bytes]] = []

    def behave(a: Any) -> Any:
        if a.number == 5:  # one request at a time: nothing else is written meanwhile
            whole = journal.read_bytes()
            journal.write_bytes(whole + b'{"reply": {"feat')
            found.append((planned(database, False, [0, 1]), whole, journal.read_bytes()))
            journal.write_bytes(whole)
        return knowing(a)

    server.behave = behave
    label_features(database, endpoint, SETTINGS, [0, 1], jobs=1)
    ((plan, whole, after),) = found
    assert after == whole + b'{"reply": {"feat'
    assert plan.requests == 2 * ALL - 5
    assert not journal.exists()


def test_none_of_a_plan_is_written(database: Path) -> None:
    planned(database, False)
    assert not journal_path(database).exists()


def test_a_choice_is_reckoned_up(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1sae_fast.labels.plan.LOOKED_AT", 2)
    plan = planned(database, False, [0, 1, 2, 3])
    assert (plan.exact, plan.looked_at, plan.requests) == (False, 2, 4 * ALL)


def test_the_command_tells_it(
    server: Server,
    endpoint: Endpoint,
    make_answer: Behave,
    knowing: Behave,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.behave = refuse(server, make_answer, knowing, "explain")
    asked(server, database, endpoint, False)
    command = ["label", str(database), "--features", "0-4", "--dry-run"]
    command += ["--explain", "10", "--test", "10", "--negatives", "10"]

    def run(*more: str) -> str:
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.delenv("R1SAE_LABEL_MODEL", raising=False)
    assert "R1SAE_LABEL_MODEL is not set" in run()
    monkeypatch.setenv("R1SAE_LABEL_MODEL", "a-model")
    told = run()
    assert "5 to label (0 labelled before); 4 begun before" in told
    assert "4 left out, whose answers could not be used: --retry-failed asks again" in told
    assert f"requests     {ALL}, if every answer can be used" in told
    assert f"requests     {5 * ALL}, if" in run("--retry-failed")
    monkeypatch.setenv("R1SAE_LABEL_MODEL", "another-model")
    told = run()
    assert "begun before" not in told
    assert f"requests     {5 * ALL}, if" in told
