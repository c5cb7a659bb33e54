"""One build of a database at a time, and none of a database that this process has open."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb

from r1sae_fast.errors import DatabaseError


@contextmanager
def building_lock(path: Path, doing: str = "building this database") -> Iterator[None]:
    """Holds ``<path>.lock.tmp``; the system releases it however the process ends.

    Raises:
        DatabaseError: another one that is ``doing`` so holds it, in this process or another.
    """
    file = path.with_name(path.name + ".lock.tmp")
    descriptor = _acquire(file, doing)
    try:
        yield
    finally:
        # While it is held, or else this could be the next one's. (Windows removes no open file.)
        if sys.platform != "win32":
            file.unlink(missing_ok=True)
        os.close(descriptor)
        if sys.platform == "win32":
            with suppress(OSError):
                file.unlink()


def _acquire(file: Path, doing: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(descriptor):
                raise DatabaseError(
                    f"{file}: another process is {doing}; wait for it or choose another path"
                )
            # The one before may have removed the file after it was opened here.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # removed just now
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
    else:
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def require_not_open(path: Path) -> None:
    """Refuses a path that this process has open in DuckDB.

    DuckDB keeps one instance for each path: whoever opened the new file would be given the old.

    Raises:
        DatabaseError: it is open.
    """
    try:
        # A setting that no other connection has: DuckDB refuses if there is an instance.
        config: dict[str, Any] = {"custom_user_agent": f"r1sae-fast-{os.urandom(8).hex()}"}
        duckdb.connect(str(path), read_only=True, config=config).close()
    except duckdb.Error as error:
        if "different configuration" in str(error):
            raise DatabaseError(
                f"{path}: this process has the database open, and would go on reading the old "
                "one; close it (FeatureDB.close) before it is built again"
            ) from None
        # Not there, damaged or open elsewhere: no matter, it will be replaced.
