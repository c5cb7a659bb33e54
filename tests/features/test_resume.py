"""A build that is killed goes on where it was, and ends as if nothing had been."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest

from r1sae_fast.features import FeatureDB

World = Any  # conftest's

# Builds in children that kill themselves before or after the n-th piece of work.
_KILLED = """
import os, signal, sys
from r1sae_fast import _core
from r1sae_fast.features import FeatureDB, clustering, new_file

path, codes = sys.argv[1], sys.argv[2]
clustering._BUCKET_BYTES = 1 << 23
clustering._GROUP_ROWS = 50
left = 0

def work():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

execute = new_file.execute
def counted(connection, query, parameters=()):
    if query in ("COMMIT", "BEGIN"):
        work()
    rows = execute(connection, query, parameters)
    if query == "COMMIT":
        work()
    return rows
new_file.execute = counted

note = clustering.Clusters.note
def noted(self, *arguments, **options):
    work()
    note(self, *arguments, **options)
    work()
clustering.Clusters.note = noted

for turn in sys.argv[3:]:
    pieces, texts = turn.split(",")
    left = int(pieces)
    child = os.fork()
    if child == 0:
        FeatureDB.build(path, codes, decode=lambda token: texts + str(token), overwrite=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    whole = not os.WIFSIGNALED(status)
    print("whole" if whole else "killed", open(path, "rb").read(3) == b"old",
          os.path.exists(path + ".tmp"), flush=True)
"""


def contents(path: Path) -> dict[str, list[Any]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        names = [row[0] for row in connection.execute("SHOW TABLES").fetchall()]
        return {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall()
            for name in names
        }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_ten_kills_lose_nothing_and_double_nothing(tmp_path: Path, make_world: Any) -> None:
    codes = make_world(21, sequences=6).write(tmp_path / "codes")
    path = tmp_path / "f.ddb"
    path.write_bytes(b"old")

    FeatureDB.build(tmp_path / "clean.ddb", codes, decode=lambda token: f"t{token}").close()
    # With other texts, what was written is written anew.
    turns = [*(f"{n},t" for n in (1, 2, 3, 3, 3, 4, 4, 4, 5, 5, 0)), "20,u", "0,v"]
    command = [sys.executable, "-c", _KILLED, str(path), str(codes), *turns]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[:10] == ["killed True True"] * 10
    assert lines[10:] == ["whole False False", "killed False True", "whole False False"]
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
