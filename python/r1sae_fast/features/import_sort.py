"""The core's sort of a database that is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from r1sae_fast import _core
from r1sae_fast.features.arrays import strings
from r1sae_fast.features.clustering import Clusters, Keep, Tables
from r1sae_fast.features.execute import execute
from r1sae_fast.features.new_file import NewFile
from r1sae_fast.features.places import PLACE, TokenPlaces, places_in
from r1sae_fast.features.schema import SEGMENTS, TABLES
from r1sae_fast.features.stream import arrow_reader
from r1sae_fast.features.writing import Texts, add_sums, load_part

Advance = Callable[[float], None]

_MADE = (
    "activations",
    "examples",
    "intervals",
    "negatives",
    "token_lift",
    "features",
    "segments",
    "positions",
)
_NOTED_ROWS = 1 << 23  # activations between two notes of how far it is
_MOST_TOKENS = 1 << 22  # ids that the core counts


def drop_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Drops what the core's sort fills."""
    for table in _MADE:
        execute(connection, f"DROP TABLE IF EXISTS {table}")


class _RefusedError(Exception):
    """The core makes no bucket of these rows."""


def _refusals(buckets: Generator[Tables, None, None]) -> Generator[Tables, None, None]:
    """The same, with the core's refusals told from the errors of all that uses them."""
    try:
        yield from buckets
    except ValueError as error:
        raise _RefusedError from error


class CoreSort:
    """Sorts the activations of ``_source`` into a new file.

    Args:
        file: the new database.
        counts: how often each feature is active.
        memory: bytes that DuckDB may use; the sort takes half as many.
    """

    def __init__(self, file: NewFile, counts: NDArray[np.uint64], memory: int) -> None:
        self._file = file
        self._connection = file.connection
        self._counts = counts
        self._clusters = Clusters(file.folder, counts, memory // 2)
        self._threads = os.cpu_count() or 1
        self._keep = Keep(coactivations=0)

    def places(self, ranges: Sequence[str]) -> TokenPlaces | None:
        """The places of the tokens that these queries give (those for the table ``tokens``), in
        this order; None where they are not such as the core wants.
        """
        outside, rows = execute(
            self._connection,
            "SELECT count(*) FILTER (NOT coalesce(token >= 0 AND sequence_id >= 0 AND "
            f"token_idx >= 0 AND token < {_MOST_TOKENS}, false)), count(*) "
            "FROM _source.main.tokens",
        )[0]
        if outside or not rows or rows >= 1 << 32:
            return None
        file: Path = self._file.folder / "places"
        records = np.memmap(file, dtype=PLACE, mode="w+", shape=int(rows))
        names = strings(SEGMENTS.values())
        start = 0
        columns = ("sequence", "position", "token")
        for query in ranges:
            relation = self._connection.sql(
                "SELECT sequence_id::BIGINT, token_idx::INTEGER, token::INTEGER, segment::VARCHAR "
                f"FROM ({query})"
            )
            for batch in arrow_reader(relation):
                part = records[start : start + batch.num_rows]
                for name, column in zip(columns, batch.columns, strict=False):
                    part[name] = column.to_numpy(zero_copy_only=False)
                numbers = pa.compute.index_in(batch.column(3), names).fill_null(len(SEGMENTS))
                part["marks"] = numbers.to_numpy(zero_copy_only=False)
                start += batch.num_rows
        if start != rows:
            return None
        return places_in(file, records)

    def scatter(self, places: TokenPlaces, advance: Advance) -> bool:
        """Brings the activations of each feature together; whether all have a place."""
        total, core = int(self._counts.sum()), places.core()
        while self._clusters.added < total:
            start = self._clusters.added
            stop = start + _NOTED_ROWS
            relation = self._connection.sql(
                "SELECT feature_id::INTEGER, sequence_id::BIGINT, token_idx::INTEGER, "
                "strength::FLOAT FROM _source.main.activations "
                f"WHERE rowid >= {start} AND rowid < {stop}"
            )
            rows = 0
            for batch in arrow_reader(relation):
                columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
                if any(column.null_count for column in batch.columns):
                    return False
                if not self._clusters.add(core, columns):
                    return False
                rows += batch.num_rows
            # Rows that were deleted leave numbers that no row has.
            if rows != min(stop, total) - start:
                return False
            self._clusters.note(start + rows)
            advance(start + rows)
        return True

    def load(self, places: TokenPlaces, advance: Advance) -> int | None:
        """Fills the tables; in how many parts, or None where a row is there twice."""
        if not self._file.done("by the core"):
            with self._file.step("by the core"):
                for table in _MADE:
                    create = f"CREATE OR REPLACE TABLE {table} ({TABLES[table]})"
                    execute(self._connection, create)
                add_sums(self._connection, places)
        known = execute(
            self._connection,
            "SELECT token, any_value(decoded_token) FROM _source.main.tokens GROUP BY token",
        )
        texts, core, done = Texts(None, dict(known)), places.core(), 0
        parts = self._clusters.parts()
        for part in parts:
            features = part.features
            step = f"features {features.start} to {features.stop}"
            if not self._file.done(step):
                cancel = _core.Cancel()
                found = self._clusters.tables(part, core, self._keep, self._threads, cancel)
                try:
                    with self._file.step(step), closing(_refusals(found)) as buckets:
                        load_part(
                            self._connection, features, buckets, self._counts, places, texts, cancel
                        )
                except _RefusedError:
                    return None
            done += part.activations
            advance(done)
        return len(parts)
