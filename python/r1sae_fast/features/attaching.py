"""Opening a file to write to it, with tables in row groups of a size that is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

ROW_GROUP = 122_880
"""Rows; DuckDB's default."""
SHORT_ROW_GROUP = 8192
"""For the table ``tokens``. DuckDB reads all texts of a row group that has one of those asked for:
of ten places in a long database, 17 of 23 ms. Whoever checkpoints with longer row groups merges
short ones, so a finished file is only written to with these."""


def attach(connection: duckdb.DuckDBPyConnection, path: Path, row_group: int) -> None:
    """Makes the file the connection's database, or attaches it anew."""
    quoted = str(path).replace("'", "''")
    connection.execute("USE memory")
    connection.execute("DETACH DATABASE IF EXISTS built")
    connection.execute(f"ATTACH '{quoted}' AS built (ROW_GROUP_SIZE {row_group})")
    connection.execute("USE built")


def connect_to_write(
    path: Path, config: dict[str, Any], row_group: int = SHORT_ROW_GROUP
) -> duckdb.DuckDBPyConnection:
    """A connection to the file, which is made if it is not there."""
    connection = duckdb.connect(":memory:", config=config)
    try:
        # DuckDB shows one of its own in notebooks.
        connection.execute("SET enable_progress_bar = false")
        attach(connection, path, row_group)
    except BaseException:
        connection.close()
        raise
    return connection
