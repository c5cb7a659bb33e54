"""Building a feature database from code shards: in bulk, bounded in memory, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from r1sae_fast import _core
from r1sae_fast.errors import DatabaseError
from r1sae_fast.examples import Examples, histogram_edges
from r1sae_fast.features.arrays import array, strings
from r1sae_fast.features.clustering import (
    Clusters,
    Keep,
    count,
    load,
    partners,
    require_largest_fits,
    save,
    shards_of,
)
from r1sae_fast.features.execute import execute
from r1sae_fast.features.labels import add_labels
from r1sae_fast.features.neighbours import checksum, neighbours
from r1sae_fast.features.new_file import NewFile, new_file
from r1sae_fast.features.places import TokenPlaces, places_of
from r1sae_fast.features.schema import FORMAT, POSITION_EDGES, SEGMENTS, TABLES, VERSION
from r1sae_fast.features.stream import ArrowStream
from r1sae_fast.features.writing import Decode, Texts, add_sums, insert, load_part
from r1sae_fast.progress import progress_bar

if TYPE_CHECKING:
    from r1sae_fast.sae import FastSAE
    from r1sae_fast.shards import CodeShards

Advance = Callable[[float], None]

_ROWS = 1 << 16  # tokens at a time
_SHOWN_TEXTS = 64  # that tell one decode from another


@dataclass(frozen=True)
class Plan:
    """What a build makes, and with how much.

    Attributes:
        keep: what is kept of each feature.
        neighbours: nearest decoder directions, if there is an SAE.
        memory: bytes that may be used.
        threads: at most so many.
    """

    keep: Keep
    neighbours: int
    memory: int
    threads: int


def build(
    path: Path,
    codes: CodeShards,
    examples: Examples | None,
    decode: Decode | None,
    sae: FastSAE | None,
    metadata: Mapping[str, object],
    plan: Plan,
    progress: bool | None,
) -> None:
    """Writes the database to ``path``; see :meth:`FeatureDB.build`."""
    if examples is not None and (examples.d_sae, examples.scanned) != (codes.d_sae, len(codes)):
        raise ValueError(
            f"the examples are of d_sae = {examples.d_sae} and {examples.scanned} rows, the codes "
            f"of d_sae = {codes.d_sae} and {len(codes)} rows; collect the examples from these codes"
        )
    if sae is not None and sae.d_sae != codes.d_sae:
        raise DatabaseError(
            f"the SAE has {sae.d_sae} features, the codes {codes.d_sae}; expected the SAE that "
            "made the codes"
        )
    texts = Texts(decode)
    key = {
        "codes": codes.fingerprint,
        "d_sae": codes.d_sae,
        "sae": None if sae is None else checksum(sae),
        "plan": repr(plan),
        "format": VERSION,
    }
    config = {
        "memory_limit": f"{max(plan.memory // 4, 192 << 20) >> 10}KiB",
        "threads": str(plan.threads),
    }
    with new_file(path, json.dumps(key), config) as file:
        builder = _Builder(file, codes, texts, plan)
        with progress_bar("building", 4 * len(codes), unit="rows", shown=progress) as advance:
            builder.begin()
            advance(len(codes))
            builder.count(examples)
            builder.load_coactivations()
            advance(2 * len(codes))
            builder.scatter(lambda rows: advance(2 * len(codes) + rows))
            builder.load_features(lambda rows: advance(3 * len(codes) + rows))
        builder.load_labels()
        if sae is not None:
            builder.load_neighbours(sae)
        builder.load_tokens()
        builder.load_meta(metadata, sae)


class _Builder:
    """Fills the tables; :func:`build` has the order."""

    def __init__(self, file: NewFile, codes: CodeShards, texts: Texts, plan: Plan) -> None:
        self._file = file
        self._connection = file.connection
        self._codes = codes
        self._texts = texts
        self._plan = plan
        self._shards = shards_of(codes)
        self._places: TokenPlaces
        self._counts: NDArray[np.uint64]
        self._clusters: Clusters

    # -- tokens ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Finds what token each row is; makes the tables, fills ``segments`` and ``positions``."""
        self._places = places = places_of(self._codes, self._file.folder / "places")
        shown = places.tokens[:: -(-len(places.tokens) // _SHOWN_TEXTS) or 1]
        step = "tokens " + json.dumps([self._texts.text(token) for token in shown.tolist()])
        if self._file.done(step):
            return
        with self._file.step(step, first=True):
            # There are some if an earlier process had another decode.
            for table, columns in TABLES.items():
                execute(self._connection, f"CREATE OR REPLACE TABLE {table} ({columns})")
            add_sums(self._connection, places)

    def load_labels(self) -> None:
        """Fills the counted part of ``autointerp``."""
        add_labels(self._connection, len(self._codes), self._codes.d_sae, len(self._places.tokens))

    def load_tokens(self) -> None:
        """Fills ``tokens``, after all other tables that are long."""
        self._file.shorten_row_groups()
        if self._file.done("tokens"):
            return
        schema = {
            "sequence_id": pa.int64(),
            "token_idx": pa.int32(),
            "token": pa.int32(),
            "decoded_token": pa.string(),
            "segment": pa.string(),
        }
        stream = ArrowStream(self._connection, schema, self._token_batches())
        with self._file.step("tokens"), stream as name:
            execute(self._connection, f"INSERT INTO tokens SELECT * FROM {name}")

    def _token_batches(self) -> Iterator[list[pa.Array]]:
        names = strings(SEGMENTS.get(i) for i in range(len(SEGMENTS) + 1))
        records = self._places.records()
        for start in range(0, len(records), _ROWS):
            part = records[start : start + _ROWS]
            token = np.ascontiguousarray(part["token"])
            yield [
                array(part["sequence"]),
                array(part["position"]),
                array(token),
                self._texts.of(token),
                names.take(array(part["marks"] & 3)),
            ]

    # -- activations ----------------------------------------------------------------------------

    def count(self, examples: Examples | None) -> None:
        """Counts the activations of each feature."""
        saved = self._file.folder / "counts.npz"
        found = load(saved, ["counts"])
        if found is None:
            counts = count(self._shards, self._codes.d_sae, self._plan.threads)
            save(saved, {"counts": counts})
        else:
            counts = found["counts"]
        require_largest_fits(counts, self._plan.memory)
        self._counts = counts
        if examples is not None:
            expected = examples.counts.numpy()
            if not np.array_equal(expected, counts.astype(np.int64)):
                feature = int(np.argmax(expected != counts.astype(np.int64)))
                raise ValueError(
                    f"the examples count {expected[feature]} activations of feature {feature}, the "
                    f"codes hold {counts[feature]}; collect the examples from these codes"
                )

    def load_coactivations(self) -> None:
        """Fills ``coactivations``."""
        if self._file.done("coactivations"):
            return
        found = partners(
            self._shards,
            self._counts,
            self._plan.keep.coactivations,
            self._plan.memory // 2,
            self._plan.threads,
        )
        with self._file.step("coactivations"):
            self._insert("coactivations", found)

    def scatter(self, advance: Advance) -> None:
        """Brings the activations of each feature together."""
        bucket_memory = self._plan.memory // 4
        self._clusters = Clusters(self._file.folder, self._counts, bucket_memory)
        if self._clusters.added < len(self._shards):
            self._clusters.add_shards(self._shards, self._places.ranks, self._plan.threads, advance)

    def load_features(self, advance: Advance) -> None:
        """Fills what is known of each feature from its activations alone."""
        places = self._places.core()
        total, done = max(1, int(self._counts.sum())), 0
        for part in self._clusters.parts():
            features = part.features
            step = f"features {features.start} to {features.stop}"
            if not self._file.done(step):
                cancel = _core.Cancel()
                plan = self._plan
                found = self._clusters.tables(part, places, plan.keep, plan.threads, cancel)
                with self._file.step(step), closing(found) as buckets:
                    load_part(
                        self._connection,
                        features,
                        buckets,
                        self._counts,
                        self._places,
                        self._texts,
                        cancel,
                    )
            done += part.activations
            advance(len(self._codes) * done / total)

    # -- what was counted -----------------------------------------------------------------------

    def load_neighbours(self, sae: FastSAE) -> None:
        """Fills ``neighbours``."""
        if self._file.done("neighbours"):
            return
        features, cosines = neighbours(sae, self._plan.neighbours)
        d_sae, n = features.shape
        with self._file.step("neighbours"):
            self._insert(
                "neighbours",
                {
                    "feature_id": np.repeat(np.arange(d_sae, dtype=np.int32), n),
                    "rank": np.tile(np.arange(1, n + 1, dtype=np.int32), d_sae),
                    "other_id": features.ravel().astype(np.int32),
                    "cosine": cosines.ravel(),
                },
            )

    def load_meta(self, metadata: Mapping[str, object], sae: FastSAE | None) -> None:
        """Fills ``meta``: what the database is of, then what the caller says."""
        keep = self._plan.keep
        known: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "d_sae": self._codes.d_sae,
            "rows": len(self._codes),
            "activations": int(self._counts.sum()),
            "examples_per_feature": keep.examples,
            "examples_per_sequence": keep.per_sequence,
            "seed": keep.seed,
            "histogram_edges": histogram_edges().tolist(),
            "position_edges": list(POSITION_EDGES),
            "codes_fingerprint": self._codes.fingerprint,
            "codes_metadata": self._codes.metadata,
            "r1sae_fast_version": version("r1sae-fast"),
            "duckdb_version": duckdb.__version__,
        }
        if sae is not None:
            known["sae_checksum"] = checksum(sae)
        entries = {**metadata, **known}
        values = [v if isinstance(v, str) else json.dumps(v, default=str) for v in entries.values()]
        with self._file.step("meta"):
            # There are some if an earlier process was killed just before the end.
            execute(self._connection, "DELETE FROM meta")
            self._insert("meta", {"key": strings(entries), "value": strings(values)})

    def _insert(self, table: str, columns: Mapping[str, Any]) -> None:
        insert(self._connection, table, columns)
