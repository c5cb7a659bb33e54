"""``r1sae features``: what it prints, and that errors are one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from typer.testing import CliRunner, Result

from r1sae_fast.cli.main import app
from r1sae_fast.examples import collect_examples
from r1sae_fast.features import FeatureDB

World = Any  # conftest's
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Runs ``r1sae features`` with the arguments, in a wide terminal."""

    def run(*arguments: object) -> Result:
        command = ["features", *map(str, arguments)]
        return CliRunner().invoke(app, command, env={"COLUMNS": "200"})

    return run


def test_build(run: Run, tmp_path: Path, make_world: Callable[..., World]) -> None:
    world = make_world(3, sequences=2)
    codes = world.write(tmp_path / "codes")
    vocabulary = {f"<{i}>": i for i in range(12)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")).save(str(tmp_path / "tokenizer.json"))
    collect_examples(codes, n=4).save(tmp_path / "examples")
    path = tmp_path / "f.ddb"

    plain = run("build", codes, path)
    assert plain.exit_code == 0, plain.output
    assert "80 tokens" in plain.output
    assert " of 24 features alive" in plain.output
    again = run("build", codes, path)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    more = ("--tokenizer", tmp_path, "--examples", tmp_path / "examples", "--overwrite")
    assert run("build", codes, path, *more).exit_code == 0
    with FeatureDB(path) as db:
        assert db.top(1, 1)[0].text.count("«<1>»") == 1
        assert db.metadata["examples_per_feature"] == "4"

    (tmp_path / "bad.json").write_text("{}")
    for tokenizer, message in (("none.json", "no such file"), ("bad.json", "not a tokenizer.json")):
        failed = run("build", codes, tmp_path / "g.ddb", "--tokenizer", tmp_path / tokenizer)
        assert failed.exit_code == 1
        assert message in failed.stderr
    assert not (tmp_path / "g.ddb").exists()


def test_top(run: Run, database: FeatureDB) -> None:
    result = run("top", database.path, 1, "-n", 3)
    assert result.exit_code == 0
    assert result.output.count("« Wait»") == 3
    lines = run("top", database.path, 1, "-n", 3, "--json").output.splitlines()
    assert [json.loads(line)["rank"] for line in lines] == [1, 2, 3]
    assert "never active" in run("top", database.path, 23).output


def test_search(run: Run, database: FeatureDB) -> None:
    result = run("search", database.path, "wait")
    assert 'fires on " Wait"' in result.output
    assert "(counted)" in result.output
    assert 'fires before " Wait"' in result.output
    hits = [
        json.loads(line)
        for line in run("search", database.path, "wait", "--json").output.splitlines()
    ]
    assert hits[0]["feature_id"] == 1
    assert "no feature found" in run("search", database.path, "no such word").output


def test_show(run: Run, database: FeatureDB) -> None:
    result = run("show", database.path, 1)
    assert result.exit_code == 0
    assert 'fires on " Wait"' in result.output
    assert "(counted)" in result.output
    assert "\x1b" not in result.output
    assert "dead: never active" in run("show", database.path, 23).output


def test_sql(run: Run, database: FeatureDB) -> None:
    query = 'SELECT token AS "a\x1bb", decoded_token FROM tokens WHERE token = 6'
    result = run("sql", database.path, query, "--limit", 2)
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert result.output.count("␛[31m") == 2
    assert "more rows (--limit)" in result.output
    rows = run("sql", database.path, "SELECT 1 AS x UNION ALL SELECT NULL ORDER BY x", "--json")
    assert [json.loads(line) for line in rows.output.splitlines()] == [{"x": 1}, {"x": None}]


def test_export(run: Run, database: FeatureDB, tmp_path: Path) -> None:
    result = run("export", database.path, tmp_path / "out")
    assert result.exit_code == 0
    assert "tokens.parquet" in result.output
    assert run("export", database.path, tmp_path / "out").exit_code == 1
    assert run("export", database.path, tmp_path / "out", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("top", "{db}", "24"), "no feature 24 in"),
        (("top", "{folder}/none.ddb", "1"), "no such file"),
        (("show", "{folder}", "1"), "holds no feature database (it has"),
        (("search", "{db}", ""), "empty"),
        (("sql", "{db}", "DROP TABLE tokens"), "SQL: "),
        (("build", "{folder}/none", "{folder}/f.ddb"), "no such folder"),
    ],
)
def test_errors_are_one_line(
    run: Run, database: FeatureDB, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*(part.format(db=database.path, folder=tmp_path) for part in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
