"""An import has the same rows, sorted by feature, and is there whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from r1sae_fast.cli.main import app
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB, import_database, importing

Release = Any  # conftest's


def rows_of(path: Path, table: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


@pytest.fixture
def source(release: Release, tmp_path: Path) -> Path:
    (tmp_path / "logic").mkdir()
    release.csv_labels(tmp_path / "logic" / "autointerp.csv")
    return release.as_duckdb(tmp_path / "logic" / "logic.ddb")


@pytest.mark.parametrize("kind", ["ranges", "one range", "trio"])
def test_the_same_rows_sorted_by_feature(
    release: Release, source: Path, tmp_path: Path, ask: Any, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out.ddb"
    if kind == "ranges":  # as if a row took half a megabyte in a sort
        monkeypatch.setattr(importing, "_SORT_BYTES", 1 << 19)
        monkeypatch.setattr(importing, "_FILE_BYTES", 7)
    start = release.trio(tmp_path / "first") if kind == "trio" else source
    done = import_database(start, out)
    assert (done.tokens, done.activations) == (len(release.tokens), len(release.activations))
    assert (done.features, done.labels) == (37, 39)
    assert (done.passes > 1) == (kind == "ranges")
    activations = rows_of(out, "activations")
    assert activations == sorted(release.activations, key=lambda r: (r[0], -r[3], r[1], r[2]))
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


# Imports in children that kill themselves, a moment after they began a certain statement.
_KILLED = """
import os, signal, sys, threading
from pathlib import Path
from r1sae_fast.features import importing, import_database

source, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
execute = importing.execute
importing._SORT_BYTES = 1 << 19  # many ranges

def main(last):
    statements = 0
    def counted(*arguments):
        nonlocal statements
        statements += 1
        if statements == last:
            delay = (seed * 7 + last) % 5 / 1000
            threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return execute(*arguments)
    importing.execute = counted
    import_database(source, out, overwrite=True, progress=False)

for last in (1, 3, 5, 7, 9, 11, 14, 18, 22, 26):
    child = os.fork()
    if child == 0:
        main(last)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(last, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "whole", out.stat().st_size,
          flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are not there")
def test_killed_imports_leave_the_old_file(release: Release, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.ddb"
    out.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(source), str(out), "7"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 10
    killed = [line for line in lines if line[1] == str(int(signal.SIGKILL))]
    assert len(killed) >= 5
    for _, end, size in lines:  # old or new, never half
        assert end in ("whole", "9")
        assert size == "3" or int(size) > 100_000
    import_database(source, out, overwrite=True)
    assert len(rows_of(out, "activations")) == len(release.activations)
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out.ddb"]
