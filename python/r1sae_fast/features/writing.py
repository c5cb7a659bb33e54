"""Rows on their way into the tables of a new database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from r1sae_fast import _core
from r1sae_fast.features.arrays import array, lists, strings
from r1sae_fast.features.attaching import ROW_GROUP
from r1sae_fast.features.clustering import Tables
from r1sae_fast.features.execute import execute
from r1sae_fast.features.places import TokenPlaces
from r1sae_fast.features.schema import POSITION_EDGES, SEGMENTS
from r1sae_fast.features.stream import ArrowStream

Decode = Callable[[int], str]


class Texts:
    """The text of each token, asked for once."""

    def __init__(
        self, decode: Decode | None, known: Mapping[int, str | None] | None = None
    ) -> None:
        self._decode = decode
        self._texts = dict(known or {})

    def of(self, tokens: NDArray[np.int32]) -> pa.Array:
        """Their texts."""
        distinct, inverse = np.unique(tokens, return_inverse=True)
        texts = [self.text(token) for token in distinct.tolist()]
        return strings(texts).take(array(inverse))

    def text(self, token: int) -> str | None:
        """A token's text."""
        if self._decode is None:
            return self._texts.get(token)
        if token not in self._texts:
            text = self._decode(token)
            if not isinstance(text, str):
                raise TypeError(f"decode({token}) gave a {type(text).__name__}; expected a str")
            # Half of a surrogate pair can't be stored as UTF-8.
            self._texts[token] = text.encode("utf-8", "replace").decode("utf-8")
        return self._texts[token]


def add_sums(connection: duckdb.DuckDBPyConnection, places: TokenPlaces) -> None:
    """Fills ``segments`` and ``positions``."""
    names = [SEGMENTS.get(i) for i in range(len(SEGMENTS) + 1)]
    highs = np.array([*POSITION_EDGES[1:], 0], dtype=np.int64)
    insert(connection, "segments", {"segment": strings(names), "tokens": places.segments})
    insert(
        connection,
        "positions",
        {
            "bin": np.arange(len(POSITION_EDGES), dtype=np.int32),
            "low": np.array(POSITION_EDGES, dtype=np.int64),
            "high": array(highs, valid=np.arange(len(highs)) < len(highs) - 1),
            "tokens": places.positions,
        },
    )


def load_part(
    connection: duckdb.DuckDBPyConnection,
    features: range,
    buckets: Iterator[Tables],
    all_counts: NDArray[np.uint64],
    places: TokenPlaces,
    texts: Texts,
    cancel: _core.Cancel,
) -> None:
    """Appends what the core found of ``features``, in the order of buckets. Ctrl-c sets
    ``cancel``, on which the making of buckets ends."""
    found: dict[str, dict[str, list[NDArray[Any]]]] = {}

    def others_kept() -> Iterator[Tables]:
        for tables in buckets:
            for table, columns in tables.items():
                if table != "activations":
                    for name, column in columns.items():
                        found.setdefault(table, {}).setdefault(name, []).append(column)
            yield tables

    insert_activations(connection, others_kept(), cancel)
    tables = {
        table: {name: np.concatenate(parts) for name, parts in columns.items()}
        for table, columns in found.items()
    }
    for table in ("examples", "intervals", "negatives"):
        insert(connection, table, tables[table])
    lifts = tables["token_lift"]
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = lifts["share"] / lifts["base"]
    insert(
        connection,
        "token_lift",
        {**lifts, "lift": lift, "decoded_token": texts.of(lifts["token"])},
    )
    figures, size = tables["features"], len(features)
    counts = all_counts[features.start : features.stop].astype(np.int64)
    segments = figures["segments"].reshape(size, len(SEGMENTS) + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # A segment without tokens has no density: NaN, stored as NULL.
        density = segments / places.segments
        mean = figures["sum"] / counts
    columns = {
        "feature_id": np.arange(features.start, features.stop, dtype=np.int32),
        "count": counts,
        "density": counts / max(places.rows, 1),
        "mean": mean,
        "max": figures["max"],
        "histogram": lists(figures["histogram"], size),
        **{f"density_{name}": density[:, i] for i, name in SEGMENTS.items()},
        "position_counts": lists(figures["positions"], size),
    }
    insert(connection, "features", columns)


def insert_activations(
    connection: duckdb.DuckDBPyConnection, buckets: Iterator[Tables], cancel: _core.Cancel
) -> None:
    """Appends to ``activations`` those of one bucket while the next is made."""
    schema = {
        "feature_id": pa.int32(),
        "sequence_id": pa.int64(),
        "token_idx": pa.int32(),
        "strength": pa.float32(),
    }
    columns = ([array(tables["activations"][name]) for name in schema] for tables in buckets)
    with ArrowStream(connection, schema, row_groups(columns)) as name:
        query = f"INSERT INTO activations BY NAME SELECT * FROM {name}"
        execute(connection, query, stop=cancel.cancel)


def insert(connection: duckdb.DuckDBPyConnection, table: str, columns: Mapping[str, Any]) -> None:
    """Appends columns (arrays of NumPy or Arrow) to those of their names. NaN becomes NULL."""
    arrays = [
        column if isinstance(column, pa.Array) else array(column) for column in columns.values()
    ]
    schema = {name: array.type for name, array in zip(columns, arrays, strict=True)}
    with ArrowStream(connection, schema, row_groups(iter([arrays]))) as name:
        execute(connection, f"INSERT INTO {table} BY NAME SELECT * FROM {name}")


def row_groups(batches: Iterator[list[pa.Array]]) -> Iterator[list[pa.Array]]:
    """The same rows in batches of :data:`ROW_GROUP`: each of DuckDB's threads takes one at a time,
    and copies what is not a whole row group."""
    held: list[pa.Array] | None = None
    for arrays in batches:
        start = 0
        if held is not None:
            start = ROW_GROUP - len(held[0])
            pairs = zip(held, arrays, strict=True)
            held = [pa.concat_arrays([rest, more.slice(0, start)]) for rest, more in pairs]
            if len(held[0]) < ROW_GROUP:
                continue
            yield held
            held = None
        rows = len(arrays[0])
        while rows - start >= ROW_GROUP:
            yield [column.slice(start, ROW_GROUP) for column in arrays]
            start += ROW_GROUP
        if start < rows:
            held = [column.slice(start) for column in arrays]
    if held is not None:
        yield held
