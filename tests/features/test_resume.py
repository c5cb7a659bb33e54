"""A build that is killed goes on where it was, and ends as if nothing had been."""

import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest

from r1sae_fast.features import FeatureDB

World = Any  # conftest's


def contents(path: Path) -> dict[str, list[Any]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        names = [row[0] for row in connection.execute("SHOW TABLES").fetchall()]
        return {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall()
            for name in names
        }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are not there")
def test_ten_kills_lose_nothing_and_double_nothing(
    tmp_path: Path, make_world: Any, run_killed: Any
) -> None:
    codes = make_world(21, sequences=6).write(tmp_path / "codes")
    path = tmp_path / "f.ddb"
    path.write_bytes(b"old")

    FeatureDB.build(tmp_path / "clean.ddb", codes, decode=lambda token: f"t{token}").close()
    # With other texts, what was written is written anew.
    turns = [*(f"{n},t" for n in (1, 2, 3, 3, 3, 4, 4, 4, 5, 5, 0)), "20,u", "0,v"]
    lines = run_killed("build", codes, path, *turns)
    killed, whole = "killed old=True tmp=True", "whole old=False tmp=False"
    assert lines[:10] == [killed] * 10
    assert lines[10:] == [whole, "killed old=False tmp=True", whole]
    expected, found = contents(tmp_path / "clean.ddb"), contents(path)
    assert found.pop("meta") == expected.pop("meta")
    assert {row[3][0] for row in found["tokens"]} == {"v"}
    # But for the texts.
    for made in (expected, found):
        made["tokens"] = [(*row[:3], row[4]) for row in made["tokens"]]
        made["token_lift"] = [(*row[:4], *row[5:]) for row in made["token_lift"]]
        made["autointerp"] = [(row[0], *row[2:]) for row in made["autointerp"]]
    assert found == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean.ddb", "codes", "f.ddb"]
