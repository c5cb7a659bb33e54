"""The files of an import: the new database, its source, and how much memory is left for both."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from r1sae_fast.features.released.connect import CONFIG, attach, load_sqlite
from r1sae_fast.features.released.recognise import Source, SqliteSource
from r1sae_fast.r1.stream.sizes import show_size

SOURCE = "_source"
"""The name under which the source is attached."""

_LEAST_MEMORY = 128 << 20


def duckdb_memory(max_memory: int) -> int:
    """How much of the cap is left for DuckDB, whose own limit leaves out some of its buffers."""
    used = _resident()
    memory = int((max_memory - used - (64 << 20)) * 0.75)
    if memory < _LEAST_MEMORY:
        least = used + (64 << 20) + _LEAST_MEMORY * 4 // 3
        raise ValueError(
            f"max_memory is {show_size(max_memory)}; this process uses {show_size(used)} already, "
            f"so expected at least {show_size(least * 1.05)}"
        )
    return memory


def _resident() -> int:
    """Bytes of memory in use by this process; a guess where the system doesn't tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 512 << 20


@contextmanager
def attached(
    connection: duckdb.DuckDBPyConnection, source: Source, destination: Path
) -> Iterator[None]:
    """Makes the source readable as ``ds``; SQLite files by way of a DuckDB file."""
    if not isinstance(source, SqliteSource):
        attach(connection, source.path, SOURCE)
        yield
        return
    staging = destination.with_name(destination.name + ".staging.tmp")
    _remove(staging)
    try:
        with duckdb.connect(str(staging), config=CONFIG) as unsorted:
            unsorted.execute("SET enable_progress_bar = false")
            unsorted.execute("SET memory_limit = '512MiB'")
            unsorted.execute("SET threads = 1")
            load_sqlite(unsorted, source)
        attach(connection, staging, SOURCE)
        yield
    finally:
        with suppress(duckdb.Error):
            connection.execute(f"DETACH {SOURCE}")
        _remove(staging)


def fingerprint(source: Source) -> str:
    """Tells the files of a source from others, and from themselves after a change."""
    files = [source.path]
    if isinstance(source, SqliteSource):
        files = [source.tokens.path, source.activations.path]
    states = [(file.resolve(), file.stat()) for file in files]
    return json.dumps([[str(file), state.st_size, state.st_mtime_ns] for file, state in states])


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.with_name(file.name + ".wal").unlink(missing_ok=True)
