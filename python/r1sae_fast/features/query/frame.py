"""Tables of features, in Arrow, which every frame library takes as they are."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from r1sae_fast.atomic import replacing

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

WRITTEN = (".parquet", ".jsonl", ".csv", ".arrow")
"""Endings of the files that :meth:`Frame.write` knows."""


class ArrowFrame(ABC):
    """What has ``to_arrow()``: becomes a data frame or a file."""

    @abstractmethod
    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Arrow's C interface: ``polars.DataFrame(frame)``, ``pandas``, DuckDB take it as it is."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self, backend: Literal["numpy", "pyarrow"] = "numpy") -> pd.DataFrame:
        """As a pandas data frame.

        Args:
            backend: ``"pyarrow"`` shares the memory and keeps integers with gaps integers;
                ``"numpy"`` is what older code expects, and shares numbers without gaps.

        Raises:
            ImportError: pandas is not installed.
        """
        table = self.to_arrow()
        if backend == "pyarrow":
            import pandas as pd

            shared: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
            return shared
        frame: pd.DataFrame = table.to_pandas(split_blocks=True)
        return frame

    def to_polars(self) -> pl.DataFrame:
        """As a polars data frame, which shares the memory.

        Raises:
            ImportError: polars is not installed.
        """
        import polars as pl

        frame = pl.from_arrow(self.to_arrow())
        assert isinstance(frame, pl.DataFrame)  # of a table, not of a column
        return frame

    def write(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Writes the rows whole or not at all: .parquet, .arrow, .csv or .jsonl.

        A .csv has no nested columns, and text in it that a spreadsheet would run as a formula has
        an apostrophe before it; the other kinds keep every text as it is.

        Raises:
            FileExistsError: the file is there already and ``overwrite`` is false.
            ValueError: another ending.
        """
        return write_table(self.to_arrow(), Path(path), overwrite=overwrite)


class Frame(ArrowFrame):
    """Features, a row each, with the columns that were asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def to_arrow(self) -> pa.Table:
        """The table itself."""
        return self._table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows as dicts."""
        return iter(self.to_dicts())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and bool(self._table.equals(other._table))

    def __hash__(self) -> int:
        return hash((self._table.num_rows, tuple(self._table.column_names)))

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as dicts."""
        rows: list[dict[str, Any]] = self._table.to_pylist()
        return rows

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self._table.column_names)

    def __repr__(self) -> str:
        return f"Frame({len(self):,} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        from r1sae_fast.features.page.tables import table_html

        return table_html(self._table)


def write_table(table: pa.Table, path: Path, *, overwrite: bool) -> Path:
    """See :meth:`ArrowFrame.write`."""
    if path.suffix not in WRITTEN:
        raise ValueError(f"{path}: of no known kind; expected one of {', '.join(WRITTEN)}")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path}: exists already; choose another name, or pass overwrite=True (--overwrite)"
        )
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            pq.write_table(table, temporary, compression="zstd")
        elif path.suffix == ".arrow":
            with (
                pa.OSFile(str(temporary), "wb") as file,
                pa.ipc.new_file(file, table.schema) as out,
            ):
                out.write_table(table)
        elif path.suffix == ".csv":
            import pyarrow.csv as pcsv

            pcsv.write_csv(for_spreadsheets(table), temporary)
        else:
            with temporary.open("w", encoding="ascii", newline="\n") as file:
                for batch in table.to_batches(max_chunksize=4096):
                    for row in batch.to_pylist():
                        # ASCII: whatever reads it, no letter can be broken or act.
                        file.write(json.dumps(row, default=str, allow_nan=False) + "\n")
    return path


_FORMULA = r"^[=+\-@\t\r\n\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}]"


def for_spreadsheets(table: pa.Table) -> pa.Table:
    """The flat columns, with no text that a spreadsheet would take for a formula.

    A label or a token may begin as one does: =, +, -, @ (full-width ones too), a tab or a line
    break. An apostrophe goes before it, as OWASP advises ("CSV Injection").
    """
    import pyarrow.compute as pc

    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type) or pa.types.is_string_view(column.type):
            column = column.cast(pa.string())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            sign, nothing = pa.scalar("'", column.type), pa.scalar("", column.type)
            quoted = pc.binary_join_element_wise(sign, column, nothing)
            column = pc.if_else(pc.match_substring_regex(column, _FORMULA), quoted, column)
        if not pa.types.is_nested(column.type):
            columns[name] = column
    return pa.table(columns)
