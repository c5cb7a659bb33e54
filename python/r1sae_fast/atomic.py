"""Files that are there whole or not at all: written beside their place, synced, renamed into it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Where :func:`replacing` has ``path`` written."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path, *, by_many: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to; on success it becomes ``path``, else it is removed.

    A process killed half-way leaves ``path`` as it was (and ``<path>.tmp``, which the next try
    overwrites). Where several processes may write at once (``by_many``) each has a temporary name
    of its own, which a kill leaves for good; the last one's file stays.
    """
    temporary = temporary_name(path)
    if by_many:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_bytes(path: Path, data: bytes, *, by_many: bool = False) -> None:
    """Writes a file whole or not at all; see :func:`replacing`."""
    with replacing(path, by_many=by_many) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name != "posix":
        return  # only posix opens folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
