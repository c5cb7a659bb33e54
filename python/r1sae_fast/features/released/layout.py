"""What tables and columns a feature database has, under which names, and of which types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.text import visible

Tables = Mapping[str, Mapping[str, str]]
"""Type of each column of each table, as the file declares it."""

# By column: the kind of its type, and the names it goes by (the first one is the released one; the
# others are of the first release, whose activations are documented nowhere).
COLUMNS = {
    "tokens": {
        "sequence_id": ("integer", ("sequence_id",)),
        "token_idx": ("integer", ("token_idx",)),
        "token": ("integer", ("token", "token_int")),
        "decoded_token": ("text", ("decoded_token", "token_text")),
    },
    "activations": {
        "feature_id": ("integer", ("feature_id",)),
        "sequence_id": ("integer", ("sequence_id",)),
        "token_idx": ("integer", ("token_idx",)),
        "strength": ("number", ("strength", "activation")),
    },
}
TABLE_NAMES = {"tokens": ("tokens",), "activations": ("activations", "feature_activations")}

_INTEGERS = {f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG")}
_INTEGERS |= {"INTEGER", "UINTEGER"}
_KINDS = {
    "integer": _INTEGERS,
    "number": {"FLOAT", "DOUBLE"},
    "text": {"VARCHAR"},
}

_SHOWN_TABLES, _SHOWN_COLUMNS = 8, 12


def describe(tables: Tables) -> str:
    """The tables and their columns, for a message: ``tokens(sequence_id BIGINT, ...)``."""
    if not tables:
        return "no tables"
    shown = []
    for name, columns in list(tables.items())[:_SHOWN_TABLES]:
        listed = [visible(f"{c} {kind}".strip()) for c, kind in columns.items()]
        more = [f"{len(listed) - _SHOWN_COLUMNS} more"] if len(listed) > _SHOWN_COLUMNS else []
        shown.append(f"{visible(name)}({', '.join(listed[:_SHOWN_COLUMNS] + more)})")
    if len(tables) > _SHOWN_TABLES:
        shown.append(f"{len(tables) - _SHOWN_TABLES} more")
    return ", ".join(shown)


def expected() -> str:
    """The tables that a feature database has, for a message."""
    return " and ".join(f"{table}({', '.join(columns)})" for table, columns in COLUMNS.items())


def require_tables(path: Path, tables: Tables) -> None:
    """Checks ``tokens`` and ``activations`` of a DuckDB file: columns and kinds of types.

    Raises:
        DatabaseError: a table or a column is missing or of another type; says what was found.
    """
    missing = [table for table in COLUMNS if table not in tables]
    if missing:
        alone = "labels alone are no database: " if "autointerp" in tables else ""
        raise DatabaseError(
            f"{path}: {alone}no feature database that is known here: it lacks the "
            f"table{'s' * (len(missing) > 1)} {' and '.join(missing)}. It has {describe(tables)}; "
            f"expected {expected()}"
        )
    for table, columns in COLUMNS.items():
        for column, (kind, _) in columns.items():
            found = tables[table].get(column)
            if found is None:
                what = f"{table} has no column {column}"
            elif found not in _KINDS[kind]:
                what = f"{table}.{column} is of type {visible(found)}, not {_article(kind)}"
            else:
                continue
            raise DatabaseError(
                f"{path}: no feature database that is known here: {what}. It has "
                f"{describe(tables)}; expected {expected()}"
            )


def find_table(table: str, tables: Tables) -> tuple[str, dict[str, str]] | None:
    """The name of ``table`` in a file of the first release, and of its columns; None: not there."""
    for name in TABLE_NAMES[table]:
        if name not in tables:
            continue
        names = {
            column: next((alias for alias in aliases if alias in tables[name]), None)
            for column, (_, aliases) in COLUMNS[table].items()
        }
        found = {column: alias for column, alias in names.items() if alias is not None}
        if len(found) == len(names):
            return name, found
    return None


def _article(kind: str) -> str:
    return {"integer": "an integer", "number": "a floating-point number", "text": "text"}[kind]
