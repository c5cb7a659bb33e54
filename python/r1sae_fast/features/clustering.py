"""Activations sorted by feature, out of core, and what each feature's tell: the core's part of a
build, with its files and how far they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from r1sae_fast import _core
from r1sae_fast.atomic import write_bytes
from r1sae_fast.features.schema import NEGATIVE_WINDOW

if TYPE_CHECKING:
    from r1sae_fast.shards import CodeShards

Shards = list[tuple[Path, int, int]]
Tables = dict[str, dict[str, NDArray[Any]]]
Advance = Callable[[float], None]

_BUCKET_BYTES = 64  # of each activation, while a bucket is sorted and written
_BUCKET_RECORDS = 1 << 20  # activations: more don't stay in the caches, and are written no faster
_MOST_BUCKETS = 512  # or more activations in each: what is written to one at a time would be short
_PART_FEATURES = 8192  # at most, and a bucket: what is kept of them is held until the part is whole
_GROUP_ROWS = 1 << 20  # of shards between two notes of how far it is
_PAIR_ROWS = 1 << 16  # of codes that are turned on their side at a time: more take longer
_LEAST_MEMORY = 256 << 20
LEAST_TOGETHER = 5
"""Pairs of features that met less often have no pointwise mutual information worth telling."""


@dataclass(frozen=True)
class Keep:
    """What is kept of each feature.

    Attributes:
        examples: strongest activations.
        per_sequence: at most so many examples of one sequence; 0: any number.
        quantiles: intervals of its strengths, of equal numbers of activations.
        per_quantile: activations drawn from each.
        negatives: random places where it is not active.
        coactivations: features that are active together with it.
        tokens: tokens at each offset.
        seed: decides what is drawn.
    """

    examples: int = 20
    per_sequence: int = 1
    quantiles: int = 5
    per_quantile: int = 5
    negatives: int = 50
    coactivations: int = 20
    tokens: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("per_sequence", 0), ("quantiles", 0),
                            ("per_quantile", 0), ("negatives", 0), ("coactivations", 0),
                            ("tokens", 0), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; expected an int")
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")

    def core(self) -> tuple[int, int, int, int, int, int, int, int]:
        """As the core wants it."""
        return (self.examples, self.per_sequence, self.quantiles, self.per_quantile,
                self.negatives, NEGATIVE_WINDOW, self.tokens, self.seed)  # fmt: skip


def shards_of(codes: CodeShards) -> Shards:
    """Files with the number of their first row and their rows."""
    found, start = [], 0
    for path, rows in zip(codes.paths, codes.rows_per_file, strict=True):
        found.append((path, start, rows))
        start += rows
    return found


def groups(shards: Shards, start: int = 0) -> Iterator[slice]:
    """Slices of shards of about :data:`_GROUP_ROWS` rows, from shard ``start`` on."""
    rows = 0
    for at in range(start, len(shards)):
        rows += shards[at][2]
        if rows >= _GROUP_ROWS or at + 1 == len(shards):
            yield slice(start, at + 1)
            start, rows = at + 1, 0


def count(shards: Shards, d_sae: int, threads: int) -> NDArray[np.uint64]:
    """How often each feature is active."""
    counts = np.zeros(d_sae, dtype=np.uint64)
    for group in groups(shards):
        _core.count_activations(shards[group], counts, threads)
    return counts


def partners(
    shards: Shards, counts: NDArray[np.uint64], n: int, memory: int, threads: int
) -> dict[str, NDArray[Any]]:
    """The table ``coactivations``: exact, in as many passes as the memory asks for."""
    rows, nnz = sum(shard[2] for shard in shards), int(counts.sum())
    found = _core.PairPartners(len(counts), n)
    if n and nnz:
        block = max(1, memory // 4 // threads // (12 * -(-nnz // rows)))
        for start, end in _core.pair_tiles(len(counts), memory * 3 // 4):
            pairs = _core.PairCounts(len(counts), start, end)
            for group in groups(shards):
                pairs.add_shards(shards[group], min(block, _PAIR_ROWS), threads)
            found.add(pairs, counts, LEAST_TOGETHER, threads)
            del pairs
    feature, rank, other, together = found.columns()
    each = counts.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log2(together * float(rows) / (each[feature] * each[other]))
    return {"feature_id": feature, "rank": rank, "other_id": other, "count": together, "pmi": pmi}


@dataclass(frozen=True)
class Part:
    """Buckets that are written together.

    Attributes:
        buckets: which.
        features: theirs.
        activations: how many they hold.
    """

    buckets: range
    features: range
    activations: int


class Clusters:
    """All activations in a file of buckets, each of whole features.

    Goes on where an earlier process was killed: what is noted in ``<folder>/state.json`` is there.

    Args:
        folder: where the files are.
        counts: how often each feature is active.
        memory: bytes that buckets may take while they are sorted.
    """

    def __init__(self, folder: Path, counts: NDArray[np.uint64], memory: int) -> None:
        self._state = folder / "state.json"
        self._part_records = max(1, memory // _BUCKET_BYTES)
        # One is written while the next is sorted.
        wanted = max(_BUCKET_RECORDS, int(counts.sum()) // _MOST_BUCKETS)
        records = max(1, min(wanted, self._part_records // 4))
        state = self._read(records)
        self.added: int = state["added"]
        self._records = records
        self._spill = _core.ActivationSpill(
            folder / "activations", counts, records, state["filled"]
        )

    def _read(self, records: int) -> dict[str, Any]:
        try:
            state = json.loads(self._state.read_bytes())
        except (FileNotFoundError, ValueError):
            state = {}
        if state.get("records") != records:
            return {"added": 0, "filled": None}
        return dict(state)

    def note(self, added: int, *, sync: bool = False) -> None:
        """Notes that what was added so far is there; ``added`` is the caller's measure of it."""
        if sync:
            self._spill.sync()
        self.added = added
        state = {"records": self._records, "added": added, "filled": self._spill.filled}
        write_bytes(self._state, json.dumps(state).encode())

    def add_shards(
        self, shards: Shards, ranks: NDArray[np.uint32] | None, threads: int, advance: Advance
    ) -> None:
        """Adds those of the shards that were not."""
        for group in groups(shards, self.added):
            self._spill.add_shards(shards[group], ranks, threads)
            self.note(group.stop)
            advance(shards[group.stop - 1][1] + shards[group.stop - 1][2])

    def add(self, places: _core.TokenPlaces, columns: Sequence[NDArray[Any]]) -> bool:
        """Adds activations: feature, sequence, position, strength. Whether all have a place.

        The caller notes how far it is.
        """
        feature, sequence, position, strength = columns
        return self._spill.add(places, feature, sequence, position, strength) is None

    def parts(self) -> list[Part]:
        """Consecutive buckets, as many as should be written in one transaction."""
        found: list[Part] = []
        records = 0
        for bucket in range(self._spill.buckets):
            first, end = self._spill.features(bucket)
            size = self._spill.size(bucket)
            last = found[-1] if found else None
            if (
                last is None
                or records + size > self._part_records
                or end - last.features.start > _PART_FEATURES
            ):
                found.append(Part(range(bucket, bucket + 1), range(first, end), size))
                records = size
            else:
                records += size
                buckets = range(last.buckets.start, bucket + 1)
                found[-1] = Part(buckets, range(last.features.start, end), records)
        return found

    def tables(
        self,
        part: Part,
        places: _core.TokenPlaces,
        keep: Keep,
        threads: int,
        cancel: _core.Cancel,
    ) -> Generator[Tables, None, None]:
        """Of each bucket of a part the sorted activations, and what they tell, by table and column.

        While the caller uses those of one bucket the next are made, on a thread that hears no
        signals: ``cancel`` ends its work, with KeyboardInterrupt. It is set when this is closed.
        """

        def made(bucket: int) -> Tables:
            core = keep.core()
            return _core.cluster_bucket(self._spill, bucket, places, core, True, threads, cancel)

        sizes = [self._spill.size(bucket) for bucket in part.buckets]
        pool = ThreadPoolExecutor(1)
        ahead: Future[Tables] | None = None
        try:
            for number, bucket in enumerate(part.buckets):
                tables = (ahead or pool.submit(made, bucket)).result()
                ahead = None
                if sum(sizes[number : number + 2]) <= self._part_records:
                    following = part.buckets[number + 1 : number + 2]
                    ahead = next((pool.submit(made, soon) for soon in following), None)
                yield tables
        finally:
            cancel.cancel()
            pool.shutdown(cancel_futures=True)


def largest_needs(counts: NDArray[Any]) -> int:
    """Bytes for sorting the activations of the feature that has most of them."""
    return int(counts.max(initial=0)) * _BUCKET_BYTES


def require_largest_fits(counts: NDArray[Any], memory: int) -> None:
    """Refuses a feature whose activations can't be sorted in half of the memory.

    Raises:
        ValueError: it names the feature and the memory that would do.
    """
    need = 2 * largest_needs(counts)
    if need > memory:
        feature = int(counts.argmax())
        raise ValueError(
            f"feature {feature} is active {int(counts[feature]):,} times, too many to be sorted "
            f"with max_memory = {memory}; expected at least {need}"
        )


def default_threads(threads: int | None) -> int:
    """At most so many; all CPUs by default."""
    if threads is None:
        return os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    return threads


def require_memory(memory: int) -> int:
    """The memory, if it is enough for anything."""
    if memory < _LEAST_MEMORY:
        raise ValueError(f"max_memory is {memory}; expected at least {_LEAST_MEMORY} (256 MiB)")
    return memory


def save(file: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Writes arrays whole or not at all."""
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]  # its stub takes allow_pickle for one
    write_bytes(file, buffer.getvalue())


def load(file: Path, names: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """What :func:`save` wrote; None if it did not."""
    try:
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in names}
    except (OSError, ValueError, KeyError):
        return None
