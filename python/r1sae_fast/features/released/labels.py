"""Reading labels that lie beside a database: autointerp.db (SQLite or DuckDB), autointerp.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.released.files import kind_of, read_duckdb
from r1sae_fast.features.released.layout import describe
from r1sae_fast.features.released.sqlite import sqlite_batches, sqlite_tables
from r1sae_fast.features.text import visible

LABEL_FILES = ("autointerp.db", "autointerp.csv")
"""Names under which labels are looked for, beside a database without any; the first one counts."""

_NUMBERS = ("quality", "interestingness")
_TEXTS = ("model_name", "prompt_version")
# The first release's labels list example tokens too (``seqs``, ``indices``): 8.7 GB, of no use to
# us in a large file; a small one (they are empty there) is read whole.
_WHOLE_BYTES = 256 << 20


def read_labels(path: Path) -> pa.Table:
    """The table ``autointerp``: the released columns, then any others as text.

    SQLite holds anything in any column: numbers that are none (empty, "N/A") become NULL.

    Raises:
        FileNotFoundError: no such file.
        DatabaseError: no labels, a damaged file, or a row without a feature.
    """
    names, rows = _source(path)
    for column in ("feature_id", "label"):
        if column not in names:
            found = ", ".join(map(visible, names)) or "none"
            raise DatabaseError(
                f"{path}: no labels: it has no column {column} (found: {found}); expected "
                f"feature_id, label, {', '.join(_NUMBERS + _TEXTS)}"
            )
    known = ("feature_id", "label", *_NUMBERS, *_TEXTS)
    extra = [name for name in names if name not in known]
    at = {name: i for i, name in enumerate(names)}
    columns: dict[str, list[Any]] = {name: [] for name in (*known, *extra)}
    try:
        for number, row in enumerate(rows, 1):
            columns["feature_id"].append(_feature(path, number, row[at["feature_id"]]))
            for name in known[1:] + tuple(extra):
                value = row[at[name]] if name in at else None
                columns[name].append(_number(value) if name in _NUMBERS else _text(value))
    except csv.Error as error:
        raise DatabaseError(f"{path}: can't be read as CSV ({error}); fetch it again") from None
    types = {"feature_id": pa.int32()} | dict.fromkeys(_NUMBERS, pa.float64())
    return pa.table(
        {name: pa.array(c, types.get(name, pa.string())) for name, c in columns.items()}
    )


def _source(path: Path) -> tuple[list[str], Iterator[Sequence[Any]]]:
    """The names of the columns, and the rows."""
    kind = kind_of(path)
    if kind == "text":
        return _csv(path)
    if kind == "duckdb":
        return read_duckdb(path, "autointerp")
    tables = sqlite_tables(path)
    if "autointerp" not in tables:
        raise DatabaseError(
            f"{path}: no labels: expected a table autointerp; it has {describe(tables)}"
        )
    names = list(tables["autointerp"])
    if path.stat().st_size > _WHOLE_BYTES:
        names = [name for name in names if name not in ("seqs", "indices")]
    batches = sqlite_batches(path, "autointerp", names, rows=1 << 12)
    return names, (row for batch in batches for row in batch)


def _csv(path: Path) -> tuple[list[str], Iterator[Sequence[Any]]]:
    # A field may be long (lists of tokens), but not without end.
    csv.field_size_limit(64 << 20)
    lines = _csv_rows(path)
    try:
        header = next(lines, [])
    except csv.Error as error:
        raise DatabaseError(f"{path}: can't be read as CSV ({error}); fetch it again") from None
    return [name.strip().removeprefix("\ufeff") for name in header], lines


def _csv_rows(path: Path) -> Iterator[Sequence[Any]]:
    width = None
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for number, row in enumerate(csv.reader(file)):
            if not row:
                continue
            width = len(row) if width is None else width
            if len(row) != width:
                raise DatabaseError(
                    f"{path}: row {number} has {len(row)} fields, the first line {width}; it may "
                    "be truncated: fetch it again"
                )
            yield row


def _feature(path: Path, row: int, value: object) -> int:
    try:
        feature = int(value) if isinstance(value, int | str) else -1
    except ValueError:
        feature = -1
    if not 0 <= feature < 1 << 31:
        raise DatabaseError(
            f"{path}: row {row} is of feature {visible(repr(value))[:80]}; expected an id, an "
            "integer of at least 0"
        )
    return feature


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        # Half of a surrogate pair can't be stored as UTF-8.
        return None if value is None else value.encode("utf-8", "replace").decode()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
