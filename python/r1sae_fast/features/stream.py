"""Arrow data on its way into DuckDB and out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from types import TracebackType

import duckdb
import pyarrow as pa

_BATCH_ROWS = 1 << 16


class ArrowStream:
    """Makes batches of columns readable in SQL, once and one at a time, under the name it gives.

    DuckDB turns an exception in the batches into its own; on leaving, the original one is raised.
    A signal's exception, for which the batches were cut short, stays.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        schema: Mapping[str, pa.DataType],
        batches: Iterator[list[pa.Array]],
    ) -> None:
        self._connection = connection
        self._schema = pa.schema(list(schema.items()))
        self._batches = batches
        self._error: BaseException | None = None

    def __enter__(self) -> str:
        reader = pa.RecordBatchReader.from_batches(self._schema, self._read())
        self._connection.register("arrow_stream", reader)
        return "arrow_stream"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A query that was interrupted has ended its transaction: until that is rolled back, nothing
        # is taken, and that would be raised in place of what happened.
        with suppress(duckdb.Error) if error is not None else nullcontext():
            self._connection.unregister("arrow_stream")
        cut_short = isinstance(self._error, KeyboardInterrupt)
        if cut_short and not isinstance(error, duckdb.Error):
            return
        if error is not None and self._error is not None:
            raise self._error from None

    def _read(self) -> Iterator[pa.RecordBatch]:
        try:
            for arrays in self._batches:
                yield pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        except (Exception, KeyboardInterrupt) as error:
            self._error = error
            raise


def arrow_table(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object]
) -> pa.Table | None:
    """A query's rows; None for a statement that has none."""
    relation = connection.sql(query, params=list(parameters))
    return None if relation is None else relation.to_arrow_table()


def arrow_reader(relation: duckdb.DuckDBPyRelation) -> pa.RecordBatchReader:
    """A query's rows as a stream of batches. DuckDB renamed the method after 1.2."""
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_arrow_reader
    reader: pa.RecordBatchReader = read(_BATCH_ROWS)
    return reader
