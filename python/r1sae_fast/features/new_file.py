"""A database while it is being written: beside its place, step by step, so that a killed build
goes on where it was."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb

from r1sae_fast.atomic import replacing, temporary_name
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.attaching import ROW_GROUP, SHORT_ROW_GROUP, attach, connect_to_write
from r1sae_fast.features.execute import execute
from r1sae_fast.features.lock import building_lock, require_not_open

_BLOCK_BYTES = "65536"
"""A column of a row group takes whole blocks, 150 to 400 KB in them: DuckDB's own size of 256 KiB
leaves a quarter of the file empty. In less than this, bit-packing is not used."""
_SHORT = "short"
"""In the folder of a file whose row groups are short from now on."""
_STEPS = 2
"""Raised whenever what a step writes, or its name, changes: what an earlier release left half done
is begun anew then, as its steps would be taken for others, or be done twice."""


class NewFile:
    """A database of which some steps are done.

    Attributes:
        connection: to the file.
        folder: for what is needed until the database is whole.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        path: Path,
        folder: Path,
        key: str,
        *,
        resumed: bool,
    ) -> None:
        self.connection = connection
        self.folder = folder
        self._path = path
        if not resumed:
            execute(connection, "CREATE TABLE _job (key VARCHAR)")
            execute(connection, "CREATE TABLE _steps (name VARCHAR)")
            execute(connection, "INSERT INTO _job VALUES (?)", [key])
        self._done = {name for (name,) in execute(connection, "SELECT name FROM _steps")}

    def done(self, name: str) -> bool:
        """Whether a step was done, now or earlier."""
        return name in self._done

    def shorten_row_groups(self) -> None:
        """From here on tables are written as ``tokens`` is to lie in the file.

        Also after a kill: whoever opens the file with longer row groups merges short ones.
        """
        (self.folder / _SHORT).touch()
        attach(self.connection, self._path, SHORT_ROW_GROUP)

    @contextmanager
    def step(self, name: str, *, first: bool = False) -> Iterator[None]:
        """What is written within is there whole or not at all, together with its note.

        ``first``: whatever was done before is to be done again.
        """
        execute(self.connection, "BEGIN")
        try:
            yield
            if first:
                execute(self.connection, "DELETE FROM _steps")
            execute(self.connection, "INSERT INTO _steps VALUES (?)", [name])
            execute(self.connection, "COMMIT")
        except BaseException:
            with suppress(duckdb.Error):
                execute(self.connection, "ROLLBACK")
            raise
        self._done = {name} if first else {*self._done, name}


@contextmanager
def new_file(
    path: Path, key: str, config: dict[str, Any], advice: str = "build"
) -> Iterator[NewFile]:
    """A database that takes the place of ``path`` on success.

    After a kill the next call with the same ``key`` (what the database is made of) goes on in
    ``<path>.tmp``; with another it begins anew. An error, or ctrl-c, leaves nothing behind.

    Raises:
        DatabaseError: another process writes it, this one has it open, or the disk is full.
    """
    spill = path.with_name(path.name + ".spill.tmp")
    work = path.with_name(path.name + ".work.tmp")
    key = f"{_STEPS}: {key}"
    require_not_open(path)
    with building_lock(path):
        _require_not_written(temporary_name(path))
        shutil.rmtree(spill, ignore_errors=True)
        config = {
            "temp_directory": str(spill),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "default_block_size": _BLOCK_BYTES,
            **config,
        }
        try:
            with replacing(path) as temporary:
                try:
                    connection, resumed = _open(temporary, work, key, config)
                    try:
                        work.mkdir(exist_ok=True)
                        file = NewFile(connection, temporary, work, key, resumed=resumed)
                        yield file
                        execute(connection, "DROP TABLE _job")
                        execute(connection, "DROP TABLE _steps")
                        execute(connection, "CHECKPOINT")
                    finally:
                        connection.close()
                finally:
                    shutil.rmtree(spill, ignore_errors=True)
                    shutil.rmtree(work, ignore_errors=True)
                    _wal(temporary).unlink(missing_ok=True)
                require_not_open(path)
                # The old file's, from a write that was killed: DuckDB would refuse the new one.
                _wal(path).unlink(missing_ok=True)
        except duckdb.Error as error:
            raise DatabaseError(_why_not_written(path, error, advice)) from None


def _open(
    temporary: Path, work: Path, key: str, config: dict[str, Any]
) -> tuple[duckdb.DuckDBPyConnection, bool]:
    """A connection to the file, and whether it is one that can go on."""
    if temporary.exists():
        with suppress(duckdb.Error):
            row_group = SHORT_ROW_GROUP if (work / _SHORT).exists() else ROW_GROUP
            connection = connect_to_write(temporary, config, row_group)
            try:
                if execute(connection, "SELECT key FROM _job") == [(key,)]:
                    return connection, True
            except duckdb.Error:
                pass  # killed at the very start
            connection.close()
    temporary.unlink(missing_ok=True)
    _wal(temporary).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    return connect_to_write(temporary, config, ROW_GROUP), False


def _wal(file: Path) -> Path:
    return file.with_name(file.name + ".wal")


def _require_not_written(temporary: Path) -> None:
    """Refuses while another process writes the file."""
    if not temporary.exists():
        return
    try:
        import fcntl
    except ImportError:  # Windows refuses to open it twice by itself
        return
    with temporary.open("r+b") as file:
        try:
            # DuckDB holds the same kind of lock on a file that it writes.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DatabaseError(
                f"{temporary}: another process is building this database; wait for it or "
                "choose another path"
            ) from None


def _why_not_written(path: Path, error: duckdb.Error, doing: str) -> str:
    if isinstance(error, duckdb.OutOfMemoryException):
        advice = f"free memory, or disk space in {path.parent}, where what doesn't fit is kept"
    elif isinstance(error, duckdb.IOException) or any(
        os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    ):  # a write that fails in a checkpoint is of the kind FATAL
        advice = f"make room in {path.parent} (a full disk? a limit on the size of files?)"
    else:
        advice = "if it is so again, please report it"
    failed = "the database could not be built" if doing == "build" else f"the {doing} failed"
    return (
        f"{path}: {failed}: {error}; {advice}, then {doing} it again "
        "(what was there before is as it was)"
    )
