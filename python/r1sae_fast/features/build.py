"""Building a feature database from code shards: in bulk, bounded in memory, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from r1sae_fast.atomic import replacing, temporary_name
from r1sae_fast.errors import DatabaseError
from r1sae_fast.examples import Examples, histogram_edges
from r1sae_fast.features.execute import execute
from r1sae_fast.features.labels import add_labels
from r1sae_fast.features.lock import building_lock, require_not_open
from r1sae_fast.features.schema import FORMAT, SEGMENTS, TABLES, VERSION
from r1sae_fast.features.stream import ArrowStream
from r1sae_fast.progress import progress_bar

if TYPE_CHECKING:
    from r1sae_fast.shards import CodeBatch, CodeShards

Decode = Callable[[int], str]

# Rows of codes in memory at a time: some tens of MB at 64 codes a row.
_ROWS = 1 << 16


def build(
    path: Path,
    codes: CodeShards,
    examples: Examples,
    decode: Decode | None,
    metadata: Mapping[str, object],
    progress: bool | None,
) -> None:
    """Writes the database to ``path``; see :meth:`FeatureDB.build`."""
    if (examples.d_sae, examples.scanned) != (codes.d_sae, len(codes)):
        raise ValueError(
            f"the examples are of d_sae = {examples.d_sae} and {examples.scanned} rows, the codes "
            f"of d_sae = {codes.d_sae} and {len(codes)} rows; collect the examples from these codes"
        )
    with _new_database(path) as connection:
        for table, columns in TABLES.items():
            execute(connection, f"CREATE TABLE {table} ({columns})")
        builder = _Builder(connection, codes, examples, decode)
        with progress_bar("building", 2 * len(codes), unit="rows", shown=progress) as advance:
            builder.load_tokens(advance)
            builder.check_places()
            builder.load_activations(advance)
        builder.load_examples()
        builder.load_features()
        add_labels(connection, len(codes), codes.d_sae)
        builder.load_meta(metadata)
        execute(connection, "CHECKPOINT")


@contextmanager
def _new_database(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to an empty database, which takes the place of ``path`` on success."""
    spill = path.with_name(path.name + ".spill.tmp")
    require_not_open(path)
    with building_lock(path):
        _clear(temporary_name(path))
        try:
            with replacing(path) as temporary:
                config: dict[str, Any] = {
                    "temp_directory": str(spill),
                    "autoinstall_known_extensions": False,
                    "autoload_known_extensions": False,
                }
                try:
                    with duckdb.connect(str(temporary), config=config) as connection:
                        # DuckDB shows one of its own in notebooks.
                        connection.execute("SET enable_progress_bar = false")
                        yield connection
                finally:
                    shutil.rmtree(spill, ignore_errors=True)
                    temporary.with_name(temporary.name + ".wal").unlink(missing_ok=True)
                require_not_open(path)
        except duckdb.Error as error:
            raise DatabaseError(_why_not_built(path, error)) from None


def _why_not_built(path: Path, error: duckdb.Error) -> str:
    if isinstance(error, duckdb.OutOfMemoryException):
        advice = f"free memory, or disk space in {path.parent}, where what doesn't fit is kept"
    elif isinstance(error, duckdb.IOException) or any(
        os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    ):  # a write that fails in a checkpoint is of the kind FATAL
        advice = f"make room in {path.parent} (a full disk? a limit on the size of files?)"
    else:
        advice = "if it is so again, please report it"
    return (
        f"{path}: the database could not be built: {error}; {advice}, then build it again "
        "(what was there before is as it was)"
    )


def _clear(temporary: Path) -> None:
    """Removes what a killed build left behind; refuses to while another one is running."""
    if not temporary.exists():
        return
    try:
        import fcntl
    except ImportError:  # Windows refuses to remove an open file by itself
        pass
    else:
        with temporary.open("r+b") as file:
            try:
                # DuckDB holds the same kind of lock on a file that it writes.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DatabaseError(
                    f"{temporary}: another process is building this database; wait for it or "
                    "choose another path"
                ) from None
    temporary.unlink()
    temporary.with_name(temporary.name + ".wal").unlink(missing_ok=True)


class _Builder:
    """Fills the tables; the methods are called in the order in which they stand."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        codes: CodeShards,
        examples: Examples,
        decode: Decode | None,
    ) -> None:
        self._connection = connection
        self._codes = codes
        self._examples = examples
        self._decode = decode
        self._texts: dict[int, str | None] = {}
        # The place of every row that is an example.
        kept = examples.rows.numpy()
        self._example_rows: NDArray[np.int64] = np.unique(kept[kept >= 0])
        self._example_sequence = np.zeros(len(self._example_rows), dtype=np.int64)
        self._example_position = np.zeros(len(self._example_rows), dtype=np.int32)
        # By segment (the last one: unknown): tokens, and activations of each feature.
        self._segment_tokens = np.zeros(len(SEGMENTS) + 1, dtype=np.int64)
        self._segment_counts = np.zeros((len(SEGMENTS) + 1, codes.d_sae), dtype=np.int64)

    # -- tokens ---------------------------------------------------------------------------------

    def load_tokens(self, advance: Callable[[float], None]) -> None:
        """Fills ``tokens``, and notes where the examples' rows are."""
        schema = {
            "sequence_id": pa.int64(),
            "token_idx": pa.int32(),
            "token": pa.int32(),
            "decoded_token": pa.string(),
            "segment": pa.string(),
        }
        with ArrowStream(self._connection, schema, self._token_batches(advance)) as name:
            execute(
                self._connection,
                f"INSERT INTO tokens SELECT * FROM {name} ORDER BY sequence_id, token_idx",
            )

    def _token_batches(self, advance: Callable[[float], None]) -> Iterator[list[pa.Array]]:
        names = pa.array([SEGMENTS.get(i) for i in range(len(SEGMENTS) + 1)])
        for start, batch in self._batches():
            self._require_places(start, batch)
            sequence, position = batch.sequence_id.numpy(), batch.position.numpy()
            low, high = np.searchsorted(self._example_rows, [start, start + len(batch)])
            rows = self._example_rows[low:high] - start
            self._example_sequence[low:high] = sequence[rows]
            self._example_position[low:high] = position[rows]
            segment = _segment_numbers(batch)
            self._segment_tokens += np.bincount(segment, minlength=len(SEGMENTS) + 1)
            yield [
                pa.array(sequence),
                pa.array(position),
                pa.array(batch.tokens.numpy()),
                self._decoded(batch.tokens.numpy()),
                names.take(pa.array(segment)),
            ]
            advance(start + len(batch))

    def _require_places(self, start: int, batch: CodeBatch) -> None:
        for column in ("tokens", "sequence_id", "position"):
            unknown = (getattr(batch, column) < 0).numpy()
            if unknown.any():
                raise ValueError(
                    f"{self._codes.folder}: {column} of row {start + int(unknown.argmax())} is "
                    "unknown; a feature database needs tokens, sequence_id and position of every "
                    "row (pass them to CodeWriter.write)"
                )

    def _decoded(self, tokens: NDArray[np.int32]) -> pa.Array:
        distinct, inverse = np.unique(tokens, return_inverse=True)
        for token in distinct.tolist():
            if token not in self._texts:
                self._texts[token] = self._text(token)
        return pa.array([self._texts[t] for t in distinct.tolist()], pa.string()).take(
            pa.array(inverse)
        )

    def _text(self, token: int) -> str | None:
        if self._decode is None:
            return None
        text = self._decode(token)
        if not isinstance(text, str):
            raise TypeError(f"decode({token}) gave a {type(text).__name__}; expected a str")
        # Half of a surrogate pair can't be stored as UTF-8.
        return text.encode("utf-8", "replace").decode("utf-8")

    def check_places(self) -> None:
        """Refuses two tokens at one place: activations would join both."""
        twice = execute(
            self._connection,
            "SELECT sequence_id, token_idx, count(*) FROM tokens GROUP BY ALL HAVING count(*) > 1 "
            "ORDER BY ALL LIMIT 1",
        )
        for sequence, place, rows in twice:
            raise ValueError(
                f"{self._codes.folder}: {rows} rows are at position {place} of sequence "
                f"{sequence}; expected one (give each text that is encoded its own sequence_id)"
            )

    # -- activations ----------------------------------------------------------------------------

    def load_activations(self, advance: Callable[[float], None]) -> None:
        """Fills ``activations``, and counts them by segment."""
        schema = {
            "feature_id": pa.int32(),
            "sequence_id": pa.int64(),
            "token_idx": pa.int32(),
            "strength": pa.float32(),
        }
        with ArrowStream(self._connection, schema, self._activation_batches(advance)) as name:
            execute(
                self._connection,
                f"INSERT INTO activations SELECT * FROM {name} "
                "ORDER BY feature_id, strength DESC, sequence_id, token_idx",
            )

    def _activation_batches(self, advance: Callable[[float], None]) -> Iterator[list[pa.Array]]:
        segments, d_sae = len(SEGMENTS) + 1, self._codes.d_sae
        for start, batch in self._batches():
            strength = batch.codes.values.to(torch.float32).numpy()
            active = strength > 0  # a stored zero is no activation
            row = batch.codes.row_ids.numpy()[active]
            feature = batch.codes.indices.numpy()[active]
            cell = _segment_numbers(batch)[row] * d_sae + feature
            counts = np.bincount(cell, minlength=segments * d_sae)
            self._segment_counts += counts.reshape(segments, d_sae)
            yield [
                pa.array(feature),
                pa.array(batch.sequence_id.numpy()[row]),
                pa.array(batch.position.numpy()[row]),
                pa.array(strength[active]),
            ]
            advance(len(self._codes) + start + len(batch))

    def _batches(self) -> Iterator[tuple[int, CodeBatch]]:
        start = 0
        for batch in self._codes.iter_batches(_ROWS):
            yield start, batch
            start += len(batch)

    # -- what was counted -----------------------------------------------------------------------

    def load_examples(self) -> None:
        """Fills ``examples``."""
        rows = self._examples.rows.numpy()
        feature, rank = np.nonzero(rows >= 0)
        place = np.searchsorted(self._example_rows, rows[feature, rank])
        self._insert(
            "examples",
            {
                "feature_id": feature.astype(np.int32),
                "rank": (rank + 1).astype(np.int32),
                "sequence_id": self._example_sequence[place],
                "token_idx": self._example_position[place],
                "strength": self._examples.strengths.numpy()[feature, rank],
            },
        )

    def load_features(self) -> None:
        """Fills ``features``, all but clarity."""
        examples, counts = self._examples, self._examples.counts.numpy()
        if not np.array_equal(counts, self._segment_counts.sum(axis=0)):
            feature = int(np.argmax(counts != self._segment_counts.sum(axis=0)))
            raise ValueError(
                f"the examples count {counts[feature]} activations of feature {feature}, the codes "
                f"hold {self._segment_counts[:, feature].sum()}; collect the examples from these "
                "codes"
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            # A segment without tokens has no density: NaN, stored as NULL.
            density = self._segment_counts / self._segment_tokens[:, None]
            mean = examples.sums.numpy() / counts
        offsets = np.arange(examples.d_sae + 1, dtype=np.int32) * examples.histogram.shape[1]
        columns = {
            "feature_id": np.arange(examples.d_sae, dtype=np.int32),
            "count": counts,
            "density": examples.densities.numpy(),
            "mean": mean,
            "max": examples.maxima.numpy(),
            "histogram": pa.ListArray.from_arrays(offsets, examples.histogram.numpy().ravel()),
            **{f"density_{name}": density[i] for i, name in SEGMENTS.items()},
            "clarity": np.full(examples.d_sae, np.nan),
        }
        self._insert("features", columns)

    def load_meta(self, metadata: Mapping[str, object]) -> None:
        """Fills ``meta``: what the database is of, then what the caller says."""
        known: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "d_sae": self._codes.d_sae,
            "rows": len(self._codes),
            "examples_per_feature": self._examples.n,
            "histogram_edges": histogram_edges().tolist(),
            "codes_fingerprint": self._codes.fingerprint,
            "codes_metadata": self._codes.metadata,
        }
        entries = {**metadata, **known}
        values = [v if isinstance(v, str) else json.dumps(v, default=str) for v in entries.values()]
        self._insert("meta", {"key": pa.array(list(entries)), "value": pa.array(values)})

    def _insert(self, table: str, columns: Mapping[str, Any]) -> None:
        # NaN becomes NULL.
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, from_pandas=True)
            for column in columns.values()
        ]
        schema = {name: array.type for name, array in zip(columns, arrays, strict=True)}
        with ArrowStream(self._connection, schema, iter([arrays])) as name:
            execute(self._connection, f"INSERT INTO {table} BY NAME SELECT * FROM {name}")


def _segment_numbers(batch: CodeBatch) -> NDArray[np.int64]:
    """Segments with every unknown one as the number after the last."""
    numbers: NDArray[np.int64] = batch.segment.numpy().astype(np.int64)
    return np.minimum(numbers, len(SEGMENTS))
