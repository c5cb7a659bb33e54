"""What is no feature database is refused by name; released databases open."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import pytest
from rich.console import Console

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB

World = Any  # conftest's


def test_missing_files_folders_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ddb: no such file; build it"):
        FeatureDB(tmp_path / "none.ddb")
    with pytest.raises(DatabaseError, match="a folder; expected a DuckDB file"):
        FeatureDB(tmp_path)
    path = tmp_path / "file.ddb"
    for content in (b"", b"short", b"text\n" * 1000, b"\0" * 10_000):
        path.write_bytes(content)
        with pytest.raises(DatabaseError, match=r"file\.ddb: not a DuckDB file"):
            FeatureDB(path)
    with closing(sqlite3.connect(tmp_path / "sqlite.db")) as connection:
        connection.execute("CREATE TABLE tokens (x)")
        connection.commit()
    with pytest.raises(DatabaseError, match=r"sqlite\.db: an SQLite file; expected"):
        FeatureDB(tmp_path / "sqlite.db")


def test_damaged_files(database: FeatureDB, tmp_path: Path) -> None:
    whole = database.path.read_bytes()
    path = tmp_path / "damaged.ddb"
    for length in (13, 100, 5000, 12_288):
        path.write_bytes(whole[:length])
        with pytest.raises(DatabaseError, match=r"damaged\.ddb"):
            FeatureDB(path)


def read_all(db: FeatureDB) -> None:
    for table in db.tables:
        db.sql(f"SELECT max(hash(t)) FROM {table} t")


def test_a_file_damaged_within(database: FeatureDB, tmp_path: Path) -> None:
    """It opens; what reads a damaged block says so, and leaves what was exported before."""
    whole = database.path.read_bytes()
    path = tmp_path / "damaged.ddb"
    out = tmp_path / "out"
    database.export(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    refused = 0
    for at in range(12_288 + 700, len(whole), 4096 * 8):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            db = FeatureDB(path)
        except DatabaseError as error:
            assert "damaged.ddb" in str(error)  # noqa: PT017
            continue
        with db:
            try:
                db.export(out, overwrite=True)
            except DatabaseError as error:
                assert "damaged.ddb: damaged (" in str(error)  # noqa: PT017
                assert "restore it" in str(error)  # noqa: PT017
                refused += 1
                with pytest.raises(DatabaseError, match=r"damaged\.ddb: damaged \("):
                    read_all(db)
            for file in out.iterdir():
                assert file.suffix == ".parquet"
                assert before.keys() >= {file.name}
    assert refused


def test_labels_in_a_file_of_their_own(world: World, database: FeatureDB, tmp_path: Path) -> None:
    """The released layout (autointerp.db beside math.ddb) is not joined, and says so."""
    labels, path = tmp_path / "autointerp.db", tmp_path / "math.ddb"
    with duckdb.connect(str(labels)) as connection:
        connection.execute("CREATE TABLE autointerp (feature_id INTEGER, label VARCHAR)")
    with pytest.raises(DatabaseError, match="labels alone are no database"):
        FeatureDB(labels)
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"ATTACH '{database.path}' AS built (READ_ONLY)")
        for table in ("tokens", "activations"):
            connection.execute(f"CREATE TABLE {table} AS SELECT * FROM built.{table}")
        connection.execute("DETACH built")
    with FeatureDB(path) as db:
        assert db.searched == ()
        assert db.feature(1).labels == ()
        with pytest.raises(DatabaseError, match=r"neither labels .*autointerp\.db"):
            db.search("wait")
    assert database.searched == ("labels", "tokens")


def test_a_database_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "else.ddb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE tokens (x INTEGER)")
    with pytest.raises(DatabaseError, match=r"lacks the table activations \(it has tokens\)"):
        FeatureDB(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP TABLE tokens")
    with pytest.raises(DatabaseError, match=r"lacks the tables tokens and activations \(it has n"):
        FeatureDB(path)


def test_names_of_tables_are_shown_harmlessly(tmp_path: Path) -> None:
    path = tmp_path / "else.ddb"
    with duckdb.connect(str(path)) as connection:
        connection.execute('CREATE TABLE "\x1b[2J\nx" (x INTEGER)')
    with pytest.raises(DatabaseError, match=r"\(it has ␛\[2J↵x\)"):
        FeatureDB(path)


_WRITER = """
import duckdb, sys
with duckdb.connect(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.readline()
"""


def test_a_file_that_another_program_writes(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    path = tmp_path / "f.ddb"
    FeatureDB.build(path, make_world(1, sequences=1).write(tmp_path / "codes")).close()
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(DatabaseError, match=r"f\.ddb: another program has it open for writing"):
            FeatureDB(path)
        writer.communicate("\n")
    with FeatureDB(path) as one, FeatureDB(path) as two:
        assert one.top(1) == two.top(1)
    with (
        duckdb.connect(str(path)),
        pytest.raises(DatabaseError, match=r"this process has it open already"),
    ):
        FeatureDB(path)


def test_a_closed_database_says_so(tmp_path: Path, make_world: Callable[..., World]) -> None:
    codes = make_world(1, sequences=1).write(tmp_path / "codes")
    with FeatureDB.build(tmp_path / "f.ddb", codes) as db:
        pass
    with pytest.raises(DatabaseError, match=r"f\.ddb: .*closed.*open it again"):
        db.top(1)


@pytest.fixture
def released(world: World, database: FeatureDB, tmp_path: Path) -> Iterator[FeatureDB]:
    """The layout of Goodfire's files: three tables, no segment, no statistics."""
    path = tmp_path / "math.ddb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"ATTACH '{database.path}' AS built (READ_ONLY)")
        connection.execute(
            "CREATE TABLE tokens AS SELECT * EXCLUDE (segment) FROM built.tokens "
            "ORDER BY hash(token_idx)"
        )
        connection.execute(
            "CREATE TABLE activations AS SELECT * FROM built.activations ORDER BY hash(token_idx)"
        )
        connection.execute(
            "CREATE TABLE autointerp AS SELECT feature_id, 'about ' || feature_id AS label, "
            "1.0 AS quality, 1.0 AS interestingness, 'a model' AS model_name, "
            "'v' AS prompt_version FROM range(24) t(feature_id)"
        )
        connection.execute("DETACH built")
    with FeatureDB(path) as db:
        yield db


def test_released_files_open(released: FeatureDB, database: FeatureDB, world: World) -> None:
    assert released.d_sae == 24  # the last one is dead, but has a label
    for feature in (1, 12):
        theirs = [(e.strength, e.sequence_id, e.token_idx, e.text) for e in released.top(feature)]
        ours = [(e.strength, e.sequence_id, e.token_idx, e.text) for e in database.top(feature)]
        assert theirs == ours
    summary = released.feature(1)
    assert summary.count == (world.dense[:, 1] > 0).sum()
    assert (summary.histogram, summary.clarity, summary.density) == (None, None, None)
    assert summary.labels[0].label == "about 1"
    assert [hit.feature_id for hit in released.search("ABOUT 1")][:2] == [1, 10]
    with Console(quiet=True) as console:
        console.print(released.show(1))
    assert released.metadata == {}
    assert released.histogram_edges is None
