"""Telling files apart by their first bytes, and connections that do nothing but what they must."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.opening import open_for_reading
from r1sae_fast.features.released.layout import describe
from r1sae_fast.features.released.sqlite import quote

KINDS = {"duckdb": "a DuckDB file", "sqlite": "an SQLite file", "text": "another file"}


def kind_of(path: Path) -> str:
    """``duckdb``, ``sqlite``, or ``text`` for anything else.

    Raises:
        FileNotFoundError: no such file.
        DatabaseError: a folder.
    """
    if path.is_dir():
        raise DatabaseError(f"{path}: a folder; expected a file")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; check the path") from None
    if start[8:12] == b"DUCK":
        return "duckdb"
    return "sqlite" if start == b"SQLite format 3\0" else "text"


def duckdb_tables(
    connection: duckdb.DuckDBPyConnection, database: str
) -> dict[str, dict[str, str]]:
    """The type of each column of each table of an attached database.

    Views are left out: what a view of a foreign file reads may be anything.
    """
    tables: dict[str, dict[str, str]] = {}
    for table, column, kind in connection.execute(
        "SELECT c.table_name, column_name, data_type FROM duckdb_columns() c "
        "JOIN duckdb_tables() t USING (database_name, schema_name, table_name) "
        "WHERE database_name = ? AND schema_name = 'main' ORDER BY table_name, column_index",
        [database],
    ).fetchall():
        tables.setdefault(table, {})[column] = kind
    return tables


def read_duckdb(path: Path, table: str) -> tuple[list[str], Iterator[Sequence[Any]]]:
    """The names of the columns of a table in a DuckDB file, and its rows.

    Raises:
        DatabaseError: no such table, or a damaged file.
    """
    with open_for_reading(path) as connection:
        name = connection.execute("SELECT current_database()").fetchall()[0][0]
        tables = duckdb_tables(connection, name)
        if table not in tables:
            raise DatabaseError(f"{path}: expected a table {table}; it has {describe(tables)}")
        try:
            rows = connection.execute(f"SELECT * FROM main.{quote(table)}").fetchall()
        except duckdb.Error as error:
            raise DatabaseError(f"{path}: damaged ({error}); fetch it again") from None
    return list(tables[table]), iter(rows)
