"""Reading SQLite files in batches (DuckDB would download an extension to do so)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from r1sae_fast.errors import DatabaseError

Row = tuple[Any, ...]


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        # DuckDB takes batches on a thread of its own, one after another.
        with closing(sqlite3.connect(uri, uri=True, check_same_thread=False)) as file:
            # SQLite doesn't check text; a broken letter is no reason to refuse 8 GB.
            file.text_factory = lambda data: data.decode("utf-8", "replace")
            yield file
    except sqlite3.Error as error:
        raise DatabaseError(
            f"{path}: can't be read as an SQLite file ({error}); fetch it again"
        ) from None


def sqlite_tables(path: Path) -> dict[str, dict[str, str]]:
    """The declared type of each column of each table; views are left out.

    Raises:
        DatabaseError: a damaged file.
    """
    with _opened(path) as file:
        names = [
            name
            for (name,) in file.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' "
                "AND name NOT LIKE 'sqlite_%' ORDER BY name"
            )
        ]
        return {
            name: {
                column: kind
                for _, column, kind, *_ in file.execute(f"PRAGMA table_info({quote(name)})")
            }
            for name in names
        }


def sqlite_batches(
    path: Path, table: str, columns: Sequence[str], rows: int = 1 << 16
) -> Iterator[list[Row]]:
    """The table's rows, at most ``rows`` at a time, in the order of the file.

    Raises:
        DatabaseError: a damaged file.
    """
    with _opened(path) as file:
        listed = ", ".join(map(quote, columns))
        cursor = file.execute(f"SELECT {listed} FROM {quote(table)}")
        while batch := cursor.fetchmany(rows):
            yield batch


def quote(name: str) -> str:
    """A name in SQL, of SQLite or DuckDB."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'
