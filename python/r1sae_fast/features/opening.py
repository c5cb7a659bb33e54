"""Opening a DuckDB file for reading, with a clear word when that can't be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

from r1sae_fast.errors import DatabaseError

_CONFIG: dict[str, Any] = {
    # A database from elsewhere, and queries on it, have no business with other files.
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    # Neither Python's variables nor secrets that the user keeps for DuckDB.
    "python_enable_replacements": False,
    "allow_persistent_secrets": False,
    # So a query can't turn these back on, nor have a log written: DuckDB then ends the process.
    "lock_configuration": True,
}


def open_for_reading(path: Path) -> duckdb.DuckDBPyConnection:
    """A read-only connection; several processes may hold one.

    Raises:
        FileNotFoundError: no such file.
        DatabaseError: not a DuckDB file, a damaged one, or one that another program is writing.
    """
    _require_duckdb_file(path)
    try:
        return duckdb.connect(str(path), read_only=True, config=_CONFIG)
    except duckdb.Error as error:
        raise DatabaseError(why_not_opened(path, error)) from None


def _require_duckdb_file(path: Path) -> None:
    """Looks at the magic bytes: DuckDB itself would fetch an extension for, say, SQLite files."""
    if path.is_dir():
        raise DatabaseError(f"{path}: a folder; expected a DuckDB file")
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; build it with FeatureDB.build or `r1sae features build`"
        ) from None
    if start[8:12] != b"DUCK":
        kind = "an SQLite file" if start.startswith(b"SQLite") else "not a DuckDB file"
        raise DatabaseError(f"{path}: {kind}; expected a feature database (DuckDB)")


def is_damage(error: Exception) -> bool:
    """Whether the file is to blame for an error while reading it, not the query.

    A checksum that doesn't fit comes as DuckDB's plain ``Error``; mistakes in a query as its kinds.
    """
    kinds = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException)
    return type(error) is duckdb.Error or isinstance(error, kinds)


def damaged(path: Path, error: Exception) -> DatabaseError:
    """What to raise where a file opened well but can't be read."""
    return DatabaseError(f"{path}: damaged ({error}); restore it or build it again")


def why_not_opened(path: Path, error: duckdb.Error) -> str:
    """The message of an error while a file is opened."""
    text = str(error)
    if "lock" in text:
        return (
            f"{path}: another program has it open for writing; close that program, or copy the "
            f"file ({text})"
        )
    if "different configuration" in text:
        return (
            f"{path}: this process has it open already through duckdb.connect; close that "
            "connection first"
        )
    return f"{path}: can't be opened as a DuckDB file ({text}); restore it or build it again"
