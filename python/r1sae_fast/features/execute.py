"""Running queries so that ctrl-c stops them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import duckdb

T = TypeVar("T")


def interruptible(
    connection: duckdb.DuckDBPyConnection,
    work: Callable[[], T],
    stop: Callable[[], None] | None = None,
) -> T:
    """``work()``, which runs queries of ``connection``; ctrl-c interrupts them.

    Newer versions of DuckDB don't look for signals while a query runs. So it runs on another
    thread, while the main one, where Python's signal handlers run, waits. ``stop`` is called too
    then: it ends what the queries wait for.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # signals are not for this thread
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        finally:
            if stop is not None and not future.done():
                stop()
            # After a signal's exception; also again, in case the query had not yet begun.
            while not future.done():
                connection.interrupt()
                wait([future], timeout=0.05)


def execute(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    parameters: Sequence[object] = (),
    stop: Callable[[], None] | None = None,
) -> list[tuple[Any, ...]]:
    """The rows of a query, or none of a statement; :func:`interruptible`."""
    values = list(parameters)
    rows: list[tuple[Any, ...]] = interruptible(
        connection, lambda: connection.execute(query, values).fetchall(), stop
    )
    return rows
