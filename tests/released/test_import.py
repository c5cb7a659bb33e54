"""An import has the same rows, sorted by feature, and is there whole or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from r1sae_fast.cli.main import app
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB, clustering, import_database, import_sort, importing
from r1sae_fast.features.attaching import SHORT_ROW_GROUP
from r1sae_fast.features.new_file import new_file

Release = Any  # conftest's


def rows_of(path: Path, table: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


@pytest.fixture
def source(release: Release, tmp_path: Path) -> Path:
    (tmp_path / "logic").mkdir()
    release.csv_labels(tmp_path / "logic" / "autointerp.csv")
    return release.as_duckdb(tmp_path / "logic" / "logic.ddb")


def test_rows_that_are_there_twice_are_sorted_otherwise(
    release: Release, source: Path, tmp_path: Path
) -> None:
    with duckdb.connect(str(source)) as connection:
        connection.execute("INSERT INTO activations SELECT * FROM activations LIMIT 1")
    import_database(source, tmp_path / "out.ddb")
    expected = sorted([*release.activations, release.activations[0]], key=lambda r: r[:3])
    assert rows_of(tmp_path / "out.ddb", "activations") == expected


def test_an_error_in_writing_is_not_taken_for_rows_that_are_there_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise pa.ArrowInvalid("arrays of two lengths")  # a ValueError, as the core's

    monkeypatch.setattr(import_sort, "load_part", broken)
    with pytest.raises(pa.ArrowInvalid, match="two lengths"):
        import_database(source, tmp_path / "out.ddb")
    assert not (tmp_path / "out.ddb").exists()


@pytest.mark.parametrize("kind", ["core", "ranges", "trio"])
def test_the_same_rows_sorted_by_feature(
    release: Release, source: Path, tmp_path: Path, ask: Any, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out.ddb"
    if kind != "trio":  # as if a row took half a megabyte in a sort
        monkeypatch.setattr(importing, "_SORT_BYTES", 1 << 19)
        monkeypatch.setattr(importing, "_FILE_BYTES", 7)
        monkeypatch.setattr(clustering, "_BUCKET_BYTES", 1 << 19)
    if kind == "ranges":
        monkeypatch.setattr(importing._Import, "_has_room", lambda *_: False)
    start = release.trio(tmp_path / "first") if kind == "trio" else source
    done = import_database(start, out)
    assert (done.tokens, done.activations) == (len(release.tokens), len(release.activations))
    assert (done.features, done.labels) == (37, 39)
    assert (done.passes > 1) == (kind != "trio")
    activations = rows_of(out, "activations")
    assert activations == sorted(release.activations, key=lambda r: r[:3])
    assert [row[:4] for row in rows_of(out, "tokens")] == release.tokens
    assert [row[:2] for row in rows_of(out, "autointerp")] == [row[:2] for row in release.labels]
    assert sorted(file.name for file in tmp_path.iterdir() if "out" in file.name) == ["out.ddb"]
    with FeatureDB.open(out) as db:
        assert db.d_sae == 40
        for feature in (0, 7, 36):
            wanted = release.around_the_strongest(feature, 10, 5)
            assert ask(db, feature, 10, 5, "ds.") == wanted  # the notebook's query as it is
            assert ask(db, feature, 10, 5, "") == wanted


def test_refusals_leave_everything_as_it_was(
    release: Release, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.ddb"
    out.write_bytes(b"old")

    def refused(error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            import_database(options.pop("source", source), options.pop("to", out), **options)
        assert out.read_bytes() == b"old"
        assert {file.name for file in tmp_path.iterdir()} <= {"out.ddb", "logic", "text", "x.ddb"}

    refused(FileExistsError, "exists already; pass overwrite=True")
    refused(ValueError, r"max_memory is 1 MB; this process uses .* at least",
            max_memory=10**6, overwrite=True)  # fmt: skip
    refused(FileNotFoundError, "no such folder", to=tmp_path / "none" / "x.ddb")
    refused(ValueError, "is the source itself", to=source, overwrite=True)
    refused(FileNotFoundError, "no such file", source=tmp_path / "none.ddb", overwrite=True)
    text = tmp_path / "text"
    text.write_text("x")
    with duckdb.connect(str(tmp_path / "x.ddb")) as connection:
        connection.execute("CREATE TABLE tokens AS SELECT 1 AS x")
        connection.execute(f"CREATE VIEW activations AS SELECT * FROM read_text('{text}')")
    refused(DatabaseError, r"lacks the table activations. It has tokens\(x INTEGER\)",
            source=tmp_path / "x.ddb", overwrite=True)  # fmt: skip
    with duckdb.connect(str(source)) as connection:
        connection.execute("INSERT INTO activations VALUES (NULL, 1, 1, 1)")
    refused(DatabaseError, "1 rows of activations are of feature None", overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    with duckdb.connect(str(source)) as connection:
        connection.execute("DELETE FROM activations WHERE feature_id IS NULL")
    refused(DatabaseError, r"20 kB are free; the database takes about", overwrite=True)


def test_a_built_database_is_not_imported(release: Release, source: Path, tmp_path: Path) -> None:
    with duckdb.connect(str(source)) as connection:
        connection.execute("CREATE TABLE meta (key VARCHAR, value VARCHAR)")
        connection.execute("CREATE TABLE features (feature_id INTEGER)")
    with pytest.raises(ValueError, match="sorted by feature already"):
        import_database(source, tmp_path / "out.ddb")


def test_the_command(source: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    arguments = ["features", "import", str(source), str(tmp_path / "out.ddb")]
    result = CliRunner().invoke(app, [*arguments, "--max-memory", "4GiB"])
    assert result.exit_code == 0, result.output
    assert "1,200 tokens, 4,800 activations of 37 features, 39 labels" in result.output
    assert CliRunner().invoke(app, arguments).exit_code == 1
    result = CliRunner().invoke(
        app, ["features", "top", str(tmp_path / "out.ddb"), "7", "--n", "1"]
    )
    assert result.exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["import", "import-by-DuckDB"])
@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are not there")
def test_ten_kills_lose_nothing_and_double_nothing(
    way: str, release: Release, source: Path, tmp_path: Path, run_killed: Any
) -> None:
    out = tmp_path / "out.ddb"
    out.write_bytes(b"old")
    turns = (1, 2, 2, 3, 3, 2, 3, 4, 1, 4, 0)
    lines = run_killed(way, source, out, *turns)
    # What a kill leaves of the new file depends on how far it was: only the old one is compared.
    assert [line.rpartition(" ")[0] for line in lines] == ["killed old=True"] * 10 + [
        "whole old=False"
    ]
    activations = rows_of(out, "activations")
    assert activations == sorted(release.activations, key=lambda r: r[:3])
    assert [row[:4] for row in rows_of(out, "tokens")] == release.tokens
    assert len(rows_of(out, "autointerp")) == len(release.labels)
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out.ddb"]


_SUMS = (
    "SELECT count(*), sum(hash(feature_id, sequence_id, token_idx, strength)::HUGEINT), "
    "count(DISTINCT feature_id) FROM activations"
)


def test_a_sort_that_spills_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One range of rows that take more than DuckDB may use; without room to spill, it fails."""
    source, out = tmp_path / "logic.ddb", tmp_path / "out.ddb"
    with duckdb.connect(str(source)) as connection:
        connection.execute("""
            CREATE TABLE tokens AS SELECT (i // 500)::BIGINT AS sequence_id,
            (i % 500)::INTEGER AS token_idx, (i % 97)::INTEGER AS token, 'x' AS decoded_token
            FROM range(40000) t(i) ORDER BY i""")
        connection.execute("""
            CREATE TABLE activations AS SELECT ((i * 7919 + i // 50) % 1000)::INTEGER AS feature_id,
            (i // 50 // 500)::BIGINT AS sequence_id, (i // 50 % 500)::INTEGER AS token_idx,
            (1 + hash(i) % 1000003 / 1000)::FLOAT AS strength FROM range(2000000) t(i)""")
        expected = connection.execute(_SUMS).fetchone()
    monkeypatch.setattr(importing, "duckdb_memory", lambda _: 48 << 20)
    monkeypatch.setattr(importing, "_PASSES", 1)
    monkeypatch.setattr(importing._Import, "_has_room", lambda *_: False)
    with monkeypatch.context() as patch:
        connect = duckdb.connect

        def without_spilling(path: str, **options: Any) -> duckdb.DuckDBPyConnection:
            if "memory_limit" in options.get("config", {}):
                options["config"] = {**options["config"], "temp_directory": ""}
            return connect(path, **options)

        patch.setattr(duckdb, "connect", without_spilling)
        with pytest.raises(DatabaseError, match="free memory, or disk space"):
            import_database(source, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["logic.ddb"]
    done = import_database(source, out)
    assert (done.passes, done.activations) == (1, 2_000_000)
    with duckdb.connect(str(out), read_only=True) as connection:
        assert connection.execute(_SUMS).fetchone() == expected
        out_of_order = connection.execute("""
            SELECT count(*) FROM (SELECT (feature_id, sequence_id, token_idx) AS here,
            lag(here) OVER (ORDER BY rowid) AS before FROM activations)
            WHERE before > here""").fetchone()
    assert out_of_order == (0,)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["logic.ddb", "out.ddb"]


def row_groups(path: Path, table: str) -> list[int]:
    """Rows of each row group."""
    with duckdb.connect(str(path), read_only=True) as connection:
        found = connection.execute(
            f"SELECT sum(count) FROM pragma_storage_info('{table}') WHERE column_id = 0 AND "
            "segment_type <> 'VALIDITY' GROUP BY row_group_id"
        ).fetchall()
    return [rows for (rows,) in found]


@pytest.mark.parametrize("by", ["core", "DuckDB"])
def test_tokens_lie_in_short_row_groups(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in what is built here: a few tokens' texts are then a short read."""
    with duckdb.connect(str(tmp_path / "math.ddb")) as connection:
        connection.execute(
            "CREATE TABLE tokens AS SELECT i // 50 AS sequence_id, i % 50 AS token_idx, i % 97 AS "
            "token, 't' || (i % 97) AS decoded_token FROM range(30000) t(i)"
        )
        connection.execute(
            "CREATE TABLE activations AS SELECT i % 7 AS feature_id, i // 50 AS sequence_id, "
            "i % 50 AS token_idx, (i % 91 + 1)::FLOAT AS strength FROM range(30000) t(i)"
        )
    if by == "DuckDB":
        monkeypatch.setattr(importing._Import, "_has_room", lambda *_: False)
    out = tmp_path / "out.ddb"
    import_database(tmp_path / "math.ddb", out)
    groups = row_groups(out, "tokens")
    assert sum(groups) == 30_000
    assert max(groups) <= SHORT_ROW_GROUP
    assert rows_of(out, "tokens") == [
        (*row, None) for row in rows_of(tmp_path / "math.ddb", "tokens")
    ]


def test_row_groups_stay_short_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out.ddb"
    child = """
import os, sys
from pathlib import Path
from r1sae_fast.features.new_file import new_file
with new_file(Path(sys.argv[1]), "key", {}) as file:
    file.connection.execute("CREATE TABLE long AS SELECT i FROM range(30000) t(i)")
    file.shorten_row_groups()
    with file.step("tokens"):
        file.connection.execute("CREATE TABLE tokens AS SELECT i FROM range(30000) t(i)")
    os._exit(7)
"""
    killed = subprocess.run([sys.executable, "-c", child, str(out)], check=False)
    assert killed.returncode == 7
    with new_file(out, "key", {}) as file:
        assert file.done("tokens")
        file.shorten_row_groups()
    assert max(row_groups(out, "tokens")) <= SHORT_ROW_GROUP
    assert sum(row_groups(out, "tokens")) == 30_000


def test_what_an_earlier_release_left_is_begun_anew(tmp_path: Path) -> None:
    out = tmp_path / "out.ddb"
    child = """
import os, sys
from pathlib import Path
from r1sae_fast.features import new_file as module
if len(sys.argv) > 2:
    module._STEPS = int(sys.argv[2])
with module.new_file(Path(sys.argv[1]), "key", {}) as file:
    print(file.done("tokens"), flush=True)
    with file.step("tokens"):
        file.connection.execute("CREATE TABLE IF NOT EXISTS tokens (i INTEGER)")
    os._exit(7)
"""

    def done(*steps: str) -> str:
        command = [sys.executable, "-c", child, str(out), *steps]
        killed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert killed.returncode == 7, killed.stderr
        return killed.stdout

    assert [done("1"), done("1"), done(), done()] == [
        f"{was_done}\n" for was_done in (False, True, False, True)
    ]


def test_what_an_import_counts(release: Release, tmp_path: Path) -> None:
    """Histograms with their edges, tokens by position, clarity; labels where there are none."""
    bare, labelled = tmp_path / "bare", tmp_path / "labelled"
    for folder in (bare, labelled):
        folder.mkdir()
        release.as_duckdb(folder / "logic.ddb")
    release.csv_labels(labelled / "autointerp.csv")
    for folder in (bare, labelled):
        done = import_database(folder / "logic.ddb", folder / "out.ddb")
        assert done.labels == (39 if folder == labelled else 0)
        with FeatureDB(folder / "out.ddb") as db:
            assert db.histogram_edges is not None
            found = db.sql(
                "SELECT f.count, list_sum(histogram) AS a, list_sum(position_counts) AS b, clarity "
                "FROM features f WHERE f.count > 0"
            ).to_pylist()
            assert len(found) == 37
            assert all(row["count"] == row["a"] == row["b"] for row in found)
            assert all(0 <= row["clarity"] <= 1 for row in found)
            for table in ("segments", "positions"):
                (row,) = db.sql(f"SELECT sum(tokens) AS n FROM {table}").to_pylist()
                assert row["n"] == len(release.tokens)
            models = {label.model_name for feature in range(37) for label in db.labels(feature)}
            assert models == ({"statistics"} if folder == bare else {"claude-3-7-sonnet-latest"})
