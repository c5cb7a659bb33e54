"""An open database file: what is in it, and reading from it."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.execute import execute, interruptible
from r1sae_fast.features.opening import damaged, is_damage
from r1sae_fast.features.released import largest_feature
from r1sae_fast.features.schema import REQUIRED
from r1sae_fast.features.stream import arrow_table
from r1sae_fast.features.text import brief, visible

Self = TypeVar("Self", bound="DatabaseFile")


_MOST = 1 << 31  # features


class DatabaseFile:
    """A file with the tables of a feature database, open for reading.

    Args:
        path: its file.
        connection: to it; closed by :meth:`close`, and here if the file is no feature database.

    Raises:
        DatabaseError: a table is missing.
    """

    def __init__(self, path: Path, connection: duckdb.DuckDBPyConnection) -> None:
        self.path = path
        self._connection = connection
        try:
            self._columns = self._read_columns()
        except BaseException:
            self._connection.close()
            raise

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables in the file."""
        return tuple(self._columns)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The table ``meta``; empty if there is none."""
        if "meta" not in self._columns:
            return {}
        return dict(self._fetch("SELECT key, value FROM meta"))

    @cached_property
    def d_sae(self) -> int:
        """The number of features; for a file that does not say, one more than the largest id."""
        if "d_sae" in self.metadata:
            told = self.metadata["d_sae"]
            # Numbers of thousands of digits are an error of their own to int().
            short = isinstance(told, str) and told.isdecimal() and len(told) < 20
            if not short or int(told) >= _MOST:
                raise DatabaseError(
                    f"{self.path}: meta says d_sae = {brief(str(told), 40)}; expected the number "
                    "of features: restore the file or build it again"
                )
            return int(told)
        with self._cursor() as cursor:
            try:
                largest = largest_feature(cursor)
            except duckdb.Error as error:
                raise damaged(self.path, error) from None
        if "autointerp" in self._columns:
            # In a sample of the tokens, a feature may never be active, but have a label.
            query = "SELECT coalesce(max(feature_id), -1) FROM autointerp"
            largest = max(largest, int(self._fetch(query)[0][0]))
        return largest + 1

    @cached_property
    def histogram_edges(self) -> tuple[float, ...] | None:
        """The edges of the histograms' bins; None if the file has no histograms."""
        try:
            edges = json.loads(self.metadata.get("histogram_edges") or "null")
            return None if edges is None else tuple(map(float, edges))
        except (ValueError, TypeError, RecursionError):
            return None

    def sql(self, query: str, parameters: Sequence[object] | None = None) -> pa.Table:
        """The result of any query that reads, as an Arrow table.

        One statement: SELECT, WITH, FROM, VALUES, PIVOT, SHOW, DESCRIBE, SUMMARIZE or EXPLAIN.

        Raises:
            DatabaseError: the file is damaged.
            ValueError: a mistake in the query, several statements or another one, or a query that
                would change the database, its settings, or reach for other files.
        """
        with self._cursor() as cursor:
            try:
                _require_one_that_reads(cursor, query)
                # EXPLAIN ANALYZE runs what it explains, and labels beside a released file lie in
                # a database in memory: nothing there may be changed either.
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                table = interruptible(cursor, lambda: arrow_table(cursor, query, parameters or ()))
            except duckdb.Error as error:
                if is_damage(error):
                    raise damaged(self.path, error) from None
                raise ValueError(f"SQL: {error}") from None
        if table is None:
            raise ValueError("SQL: the query gives no rows; expected one that reads (SELECT ...)")
        return table

    def close(self) -> None:
        """Closes the file; using the database afterwards is an error."""
        self._connection.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @contextmanager
    def _cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        # One for each query: a connection can't be shared among threads.
        try:
            cursor = self._connection.cursor()
        except duckdb.Error as error:
            raise DatabaseError(f"{self.path}: {error}; open it again") from None
        try:
            yield cursor
        finally:
            cursor.close()

    def _fetch(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._cursor() as cursor:
            try:
                return execute(cursor, query, parameters)
            except duckdb.Error as error:
                if is_damage(error):
                    raise damaged(self.path, error) from None
                raise DatabaseError(f"{self.path}: {error}") from None

    def _fetch_arrow(self, query: str) -> pa.Table:
        with self._cursor() as cursor:
            try:
                return interruptible(cursor, lambda: arrow_table(cursor, query, ()))
            except duckdb.Error as error:
                raise damaged(self.path, error) from None

    def _read_columns(self) -> dict[str, set[str]]:
        columns: dict[str, set[str]] = {}
        for table, column in self._fetch(
            "SELECT table_name, column_name FROM information_schema.columns "
            "WHERE table_catalog = current_database() AND table_schema = 'main' ORDER BY ALL"
        ):
            columns.setdefault(table, set()).add(column)
        missing = [table for table in REQUIRED if table not in columns]
        if missing:
            present = ", ".join(map(visible, columns)) or "none"
            advice = "build one with FeatureDB.build or `r1sae features build`"
            if "autointerp" in columns:
                advice = "labels alone are no database: open the one they belong to (math.ddb, ...)"
            raise DatabaseError(
                f"{self.path}: no feature database: it lacks the table{'s' * (len(missing) > 1)} "
                f"{' and '.join(missing)} (it has {present}); {advice}"
            )
        return columns

    def _known(self, feature: int) -> int:
        """The feature's id as a plain int, if there is such a feature."""
        if isinstance(feature, bool) or not hasattr(feature, "__index__"):
            raise TypeError(f"feature is {feature!r}; expected its id, an int")
        number = operator.index(feature)
        if not 0 <= number < self.d_sae:
            raise ValueError(
                f"no feature {number} in {self.path}: it has {self.d_sae:,} features, "
                f"0 to {self.d_sae - 1}"
            )
        return number


def _require_one_that_reads(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """Parses the query, runs nothing."""
    kinds = [statement.type.name for statement in connection.extract_statements(query)]
    if len(kinds) > 1:
        raise ValueError(f"SQL: {len(kinds)} statements; expected one, pass them one by one")
    # SHOW, DESCRIBE and so on are of the kind SELECT; MULTI is PIVOT.
    if kinds and kinds[0] not in {"SELECT", "EXPLAIN", "MULTI"}:
        raise ValueError(
            f"SQL: the query is of the kind {kinds[0]}; expected one that reads (SELECT, WITH, "
            "FROM, SHOW, DESCRIBE, SUMMARIZE, EXPLAIN)"
        )
