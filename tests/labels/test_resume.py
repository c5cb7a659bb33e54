"""Killed in the midst, again and again: nothing is lost, doubled, or paid twice."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from r1sae_fast.errors import DatabaseError, LabelError
from r1sae_fast.features import FeatureDB
from r1sae_fast.labels import Endpoint, LabelSettings, label_features, merge_labels
from r1sae_fast.labels.journal import journal_path
from r1sae_fast.labels.run import LabelRun

Server = Any  # conftest's
Behave = Callable[..., Any]
SMALL = {"explain": 10, "test": 10, "negatives": 10}
TABLES = ("autointerp", "scores", "label_usage")
JOBS = 4

# Imports once, then forks for each run that it is told of: an import takes longer than a run.
NURSERY = """
import json, os, signal, sys
from r1sae_fast.labels import Endpoint, LabelSettings, label_features, merge

def run(path, url, settings, features, kill_at):
    if kill_at is not None:
        # Killed at a step of the merge: 0 is its first statement, the last cuts the journal.
        steps = iter(range(1000))
        def counted(whole):
            def step(*arguments, **options):
                if next(steps) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return whole(*arguments, **options)
            return step
        merge.execute = counted(merge.execute)
        merge.Journal.rewrite = counted(merge.Journal.rewrite)
    endpoint = Endpoint(url, "a-model")
    label_features(path, endpoint, LabelSettings(**settings), features, jobs=4, round_size=3)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*json.loads(line))
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Runs in processes of their own, which can be killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, database: Path, server: Server, kill_at: int | None = None) -> int:
        """Begins a run; gives its process."""
        assert self._process.stdin is not None
        told = [str(database), server.url, SMALL, list(range(8)), kill_at]
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> int:
        """Waits for it; gives its exit code."""
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def content(path: Path) -> dict[str, list[dict[str, Any]]]:
    with FeatureDB(path) as db:
        return {
            table: db.sql(f"SELECT * FROM {table} ORDER BY ALL").to_pylist() for table in TABLES
        }


@pytest.fixture
def undisturbed(
    server: Server, endpoint: Endpoint, knowing: Behave, built: Path, tmp_path: Path
) -> tuple[dict[str, Any], int]:
    """The tables after a run that nothing befell, and the requests it took."""
    path = tmp_path / "undisturbed.ddb"
    path.write_bytes(built.read_bytes())
    server.behave = knowing
    label_features(path, endpoint, LabelSettings(**SMALL), range(8), jobs=JOBS, round_size=3)
    tables, requests = content(path), server.answered
    server.paid.clear()
    server.answered = 0
    return tables, requests


@pytest.mark.slow
def test_killed_ten_times(
    server: Server, nursery: Nursery, database: Path, undisturbed: tuple[dict[str, Any], int]
) -> None:
    expected, requests = undisturbed
    kills = 10
    for _ in range(kills):
        server.hold(requests // (kills + 1))
        process = nursery.start(database, server)
        server.held.wait()  # it has so many answers more, and now waits for others
        os.kill(process, signal.SIGKILL)
        assert nursery.end() == -signal.SIGKILL
    server.hold(None)
    nursery.start(database, server)
    assert nursery.end() == 0
    assert content(database) == expected
    # Each kill costs what was in flight at most.
    assert len(server.paid) == requests
    assert sum(server.paid.values()) <= requests + kills * JOBS
    assert not journal_path(database).exists()


@pytest.mark.slow
def test_killed_while_merging(
    server: Server, nursery: Nursery, database: Path, undisturbed: tuple[dict[str, Any], int]
) -> None:
    expected, requests = undisturbed
    # Of the sixteen steps of a merge: BEGIN, three tables made, three times three statements,
    # COMMIT, CHECKPOINT, the journal cut. As it never is, every run has something to merge.
    for kill_at in (0, 1, 3, 4, 6, 8, 11, 13, 14, 15):
        nursery.start(database, server, kill_at)
        assert nursery.end() == -signal.SIGKILL, kill_at
        assert journal_path(database).exists()
        with FeatureDB(database) as db:  # readers see it whole, before or after
            found = db.sql("SELECT count(*) AS n FROM label_usage").to_pylist()
            assert found == [{"n": 8 if kill_at > 13 else 0}], kill_at
    nursery.start(database, server)
    assert nursery.end() == 0
    assert content(database) == expected
    assert sum(server.paid.values()) == requests


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_stopped(
    server: Server,
    endpoint: Endpoint,
    database: Path,
    undisturbed: tuple[dict[str, Any], int],
    kind: type[BaseException],
) -> None:
    expected, requests = undisturbed
    stopped = False

    def stop(run: LabelRun) -> None:
        nonlocal stopped
        if run.asked.requests >= 20 and not stopped:
            stopped = True
            if kind is Stop:
                raise Stop
            signal.raise_signal(signal.SIGINT)

    settings = LabelSettings(**SMALL)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may have been ignored
    try:
        with pytest.raises(kind):
            label_features(database, endpoint, settings, range(8), jobs=JOBS, watch=stop)
    finally:
        signal.signal(signal.SIGINT, before)
    run = label_features(database, endpoint, settings, range(8), jobs=JOBS)
    assert content(database) == expected
    assert run.replayed + run.before > 0
    assert sum(server.paid.values()) <= requests + JOBS


def test_readers_go_on(server: Server, endpoint: Endpoint, knowing: Behave, database: Path) -> None:
    """Another process has the database open all the while."""
    server.behave = knowing
    reader = (
        "import sys; from r1sae_fast.features import FeatureDB; db = FeatureDB(sys.argv[1]); "
        "print('open', flush=True); input(); "
        "assert [x.model_name for x in db.labels(1)] == ['statistics']; db.close(); "
        "db = FeatureDB(sys.argv[1]); print(db.labels(1)[0].label, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", reader, str(database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    run = label_features(database, endpoint, LabelSettings(scorers=()), range(4), round_size=2)
    assert run.unmerged is None
    out, _ = process.communicate("\n")
    assert process.returncode == 0
    assert out == "feature 1\n"
    assert len(content(database)["label_usage"]) == 4


def test_merged_later(
    server: Server,
    endpoint: Endpoint,
    knowing: Behave,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it can't be written to, labels wait in the journal."""
    server.behave = knowing

    def full(*arguments: object) -> None:
        raise DatabaseError("no room")

    settings = LabelSettings(scorers=())
    with monkeypatch.context() as patch:
        patch.setattr("r1sae_fast.labels.merge._into", full)
        run = label_features(database, endpoint, settings, range(4), round_size=2)
    assert run.unmerged == "no room"
    assert run.labelled == 4
    assert journal_path(database).exists()
    again = label_features(database, endpoint, settings, range(2))
    assert (again.labelled, again.before) == (0, 2)
    assert server.answered == 4
    assert not journal_path(database).exists()
    assert {row["label"] for row in content(database)["autointerp"]} >= {
        f"feature {i}" for i in range(4)
    }
    assert merge_labels(database) == 0


def test_merging_twice_is_merging_once(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path, tmp_path: Path
) -> None:
    server.behave = knowing
    kept: list[bytes] = []

    def keep(run: LabelRun) -> None:
        kept.append(journal_path(database).read_bytes())

    label_features(database, endpoint, LabelSettings(**SMALL), range(3), watch=keep)
    once = content(database)
    for _ in range(2):
        journal_path(database).write_bytes(kept[-1])
        assert merge_labels(database) == 3
        assert content(database) == once


def test_other_names_of_a_database(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path
) -> None:
    server.behave = knowing
    link = database.with_name("link.ddb")
    link.symlink_to(database)
    label_features(link, endpoint, LabelSettings(scorers=()), [1])
    assert link.is_symlink()
    with FeatureDB(database) as db:
        assert db.labels(1)[0].label == "feature 1"


def test_a_new_database_in_the_place_of_one_whose_merge_was_killed(
    server: Server,
    nursery: Nursery,
    database: Path,
    knowing: Behave,
    built: Path,
) -> None:
    """DuckDB's log of the old one would not fit the new one."""
    server.behave = knowing
    log = database.with_name(database.name + ".wal")
    nursery.start(database, server, 14)  # committed, but not in the file itself
    assert nursery.end() == -signal.SIGKILL
    assert log.exists()
    FeatureDB.build(database, built.parent / "codes", overwrite=True).close()
    with FeatureDB(database) as db:
        assert len(db.labels(1)) == 1
    # Built from the same codes: what was paid for is not lost.
    assert merge_labels(database) == 3
    with FeatureDB(database) as db:
        assert db.labels(1)[0].label == "feature 1"


def test_journals_that_are_none(endpoint: Endpoint, database: Path) -> None:
    journal = journal_path(database)
    for data, message in (
        (b"", "no journal"),
        (b"x\n", "no journal"),
        (b'{"format": "r1sae-labels", "version": 1, "database": "other"}\n', "another database"),
    ):
        journal.write_bytes(data)
        with pytest.raises(LabelError, match=message):
            label_features(database, endpoint)
        assert journal.read_bytes() == data


def test_a_line_cut_in_half_or_damaged(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path
) -> None:
    server.behave = knowing
    kept: list[bytes] = []
    settings = LabelSettings(scorers=())
    label_features(
        database,
        endpoint,
        settings,
        [1],
        watch=lambda run: kept.append(journal_path(database).read_bytes()),
    )
    journal = journal_path(database)
    journal.write_bytes(kept[-1] + b'{"reply": {"feat')
    assert merge_labels(database) == 1
    damaged = kept[-1].replace(b'"label"', b'"lable"', 1)
    assert damaged != kept[-1]
    journal.write_bytes(damaged)
    with pytest.raises(LabelError, match="line 3 is damaged"):
        merge_labels(database)
    assert journal.read_bytes() == damaged


def test_one_at_a_time(server: Server, endpoint: Endpoint, knowing: Behave, database: Path) -> None:
    server.behave = knowing

    def second(run: LabelRun) -> None:
        with pytest.raises(DatabaseError, match=r"database open|labelling"):
            label_features(database, endpoint)
        with pytest.raises(DatabaseError, match=r"database open|labelling"):
            merge_labels(database)

    label_features(database, endpoint, LabelSettings(scorers=()), [1], watch=second)
    with FeatureDB(database), pytest.raises(DatabaseError, match="this process has the database"):
        label_features(database, endpoint, features=[2])
