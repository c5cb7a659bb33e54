"""Released databases in SQL: their tables under the names that ours have, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.execute import execute
from r1sae_fast.features.opening import open_for_reading, why_not_opened
from r1sae_fast.features.released.files import duckdb_tables
from r1sae_fast.features.released.labels import read_labels
from r1sae_fast.features.released.layout import COLUMNS, require_tables
from r1sae_fast.features.released.recognise import (
    DuckdbSource,
    Source,
    SqliteSource,
    SqliteTable,
)
from r1sae_fast.features.released.sqlite import sqlite_batches
from r1sae_fast.features.stream import ArrowStream

IN_MEMORY_BYTES = 256 << 20
"""SQLite files up to this size (together) are opened as they are, by reading them into memory."""

_MANY_ROWS = 100_000_000

CONFIG: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}

_TYPES = {"integer": pa.int64(), "number": pa.float32(), "text": pa.string()}


def open_source(source: Source) -> duckdb.DuckDBPyConnection:
    """A connection that reads the source and no other file.

    A DuckDB file with labels of its own (or without any) is opened as it is. Else the connection
    is to an empty database in memory with the labels, and with the released file attached as
    ``ds``, as in the release's notebook; ``tokens`` and ``activations`` are views of its tables.

    Raises:
        DatabaseError: damaged or unknown files, or SQLite files too large for memory.
    """
    if isinstance(source, DuckdbSource):
        return _open_duckdb(source)
    if source.size > IN_MEMORY_BYTES:
        raise DatabaseError(
            f"{source.path}: the SQLite files of the first release ({source.size / 1e9:.1f} GB) "
            "have no index by feature; import them once, then open the new file: "
            f"r1sae features import {source.path.parent} features.ddb"
        )
    connection = duckdb.connect(":memory:", config=CONFIG)
    try:
        load_sqlite(connection, source)
        _load_labels(connection, source.labels)
        _lock(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _open_duckdb(source: DuckdbSource) -> duckdb.DuckDBPyConnection:
    connection = open_for_reading(source.path)
    try:
        tables = _tables(connection, source.path)
        labelled = "autointerp" in tables
        require_tables(source.path, tables)
    except BaseException:
        connection.close()
        raise
    if labelled and source.chosen:
        connection.close()
        raise ValueError(
            f"{source.path}: has labels already (table autointerp), so {source.labels} can't be "
            "joined; open it without labels=..."
        )
    if labelled or source.labels is None:
        return connection
    connection.close()
    connection = duckdb.connect(":memory:", config=CONFIG)
    try:
        attach(connection, source.path, "ds")
        for table in ("tokens", "activations"):
            connection.execute(f"CREATE VIEW {table} AS SELECT * FROM ds.main.{table}")
        _load_labels(connection, source.labels)
        _lock(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def attach(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> None:
    """Attaches a DuckDB file under a name, for reading.

    Raises:
        DatabaseError: it can't be opened.
    """
    quoted = str(path.absolute()).replace("'", "''")
    try:
        connection.execute(f"ATTACH '{quoted}' AS {name} (READ_ONLY)")
    except duckdb.Error as error:
        raise DatabaseError(why_not_opened(path, error)) from None


def load_sqlite(connection: duckdb.DuckDBPyConnection, source: SqliteSource) -> None:
    """Copies tokens and activations into tables of their released names and columns."""
    for name, table in (("tokens", source.tokens), ("activations", source.activations)):
        schema = {column: _TYPES[kind] for column, (kind, _) in COLUMNS[name].items()}
        batches = _arrow_batches(table, schema)
        with ArrowStream(connection, schema, batches) as stream:
            execute(connection, f"CREATE TABLE {name} AS SELECT * FROM {stream}")


def _arrow_batches(table: SqliteTable, schema: dict[str, pa.DataType]) -> Iterator[list[pa.Array]]:
    done = 0
    for rows in sqlite_batches(table.path, table.table, list(table.columns.values())):
        columns = list(zip(*rows, strict=True))
        arrays = []
        for (name, kind), values in zip(schema.items(), columns, strict=True):
            convert = {pa.int64(): int, pa.float32(): float}.get(kind, _text)
            try:
                # SQLite holds anything in any column: '7' is a number, 'x' is none.
                arrays.append(pa.array(map(partial(_or_none, convert), values), kind))
            except (TypeError, ValueError, OverflowError, pa.ArrowException):
                raise DatabaseError(
                    f"{table.path}: {table.table}.{table.columns[name]} holds a value that is no "
                    f"{kind} in rows {done + 1} to {done + len(rows)}; the file is damaged or of "
                    "another kind"
                ) from None
        done += len(rows)
        yield arrays


def _or_none(convert: Any, value: Any) -> Any:
    return None if value is None else convert(value)


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _load_labels(connection: duckdb.DuckDBPyConnection, path: Path | None) -> None:
    if path is None:
        return
    labels = read_labels(path)
    with registered(connection, labels) as name:
        connection.execute(f"CREATE TABLE autointerp AS SELECT * FROM {name}")


@contextmanager
def registered(connection: duckdb.DuckDBPyConnection, table: pa.Table) -> Iterator[str]:
    """Makes a table readable in SQL, under the name it gives."""
    connection.register("arrow_table", table)
    try:
        yield "arrow_table"
    finally:
        connection.unregister("arrow_table")


def _lock(connection: duckdb.DuckDBPyConnection) -> None:
    """From here on it reads no file but those attached, and settings stay as they are."""
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _tables(connection: duckdb.DuckDBPyConnection, path: Path) -> dict[str, dict[str, str]]:
    try:
        (name,) = connection.execute("SELECT current_database()").fetchall()[0]
        return duckdb_tables(connection, name)
    except duckdb.Error as error:
        raise DatabaseError(f"{path}: damaged ({error}); fetch it again") from None


def largest_feature(connection: duckdb.DuckDBPyConnection) -> int:
    """The largest feature_id in ``activations``; -1 where there is none.

    ``max`` of 67 billion rows would take minutes: of many rows a bound is taken, which DuckDB
    keeps in its statistics (deleted rows may have made it too large).
    """
    (rows,) = connection.execute("SELECT count(*) FROM activations").fetchall()[0]
    if rows > _MANY_ROWS:
        known = connection.execute("SELECT stats(feature_id) FROM activations LIMIT 1").fetchall()
        # A struct since DuckDB 1.5, text before.
        bound = re.search(r"[Mm]ax\W+(\d+)", str(known[0][0])) if known else None
        if bound is not None:
            return int(bound[1])
    query = "SELECT coalesce(max(feature_id), -1) FROM activations"
    return int(execute(connection, query)[0][0])
