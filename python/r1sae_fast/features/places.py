"""What token each row of codes is, in the order of sequence and position, in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from r1sae_fast import _core
from r1sae_fast.features.schema import POSITION_EDGES, SEGMENTS

if TYPE_CHECKING:
    from r1sae_fast.shards import CodeShards

PLACE = np.dtype(
    [("sequence", "<i8"), ("position", "<i4"), ("token", "<i4"), ("marks", "<u4")], align=False
)
"""A record as the core reads it: marks are the segment, 4 if the row before is the place before,
8 if the row after is the place after."""

_BEFORE, _AFTER = 4, 8
_ROWS = 1 << 20  # at a time


@dataclass(frozen=True)
class TokenPlaces:
    """All rows, in the order of places.

    Attributes:
        file: the records.
        ranks: of each row of the codes its number in that order; None: the same.
        segments: how many tokens each segment has, the last one: unknown.
        positions: how many tokens each bin of positions has.
        tokens: all token ids, rising.
    """

    file: Path
    rows: int
    ranks: NDArray[np.uint32] | None
    segments: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: NDArray[np.int32]

    def records(self) -> NDArray[np.void]:
        """The records, mapped."""
        if not self.rows:
            return np.empty(0, dtype=PLACE)
        return np.memmap(self.file, dtype=PLACE, mode="r", shape=self.rows)

    def core(self) -> _core.TokenPlaces:
        """The core's view of them."""
        return _core.TokenPlaces(self.records().view(np.uint8).view(np.ndarray))


def places_of(codes: CodeShards, file: Path) -> TokenPlaces:
    """Reads the token columns of all shards and writes ``file``.

    Memory is bounded where rows are in the order of places; else it takes 28 bytes a row.

    Raises:
        ValueError: a row of unknown token, sequence or position, or two at one place.
    """
    rows = len(codes)
    if not rows:
        empty = np.zeros(0, dtype=np.int32)
        counts = np.zeros(len(SEGMENTS) + 1, np.int64), np.zeros(len(POSITION_EDGES), np.int64)
        return TokenPlaces(file, 0, None, *counts, empty)
    places = np.memmap(file, dtype=PLACE, mode="w+", shape=rows)
    start = 0
    for path in codes.paths:
        with safe_open(path, framework="np") as shard:
            columns = {
                name: shard.get_tensor(name)
                for name in ("tokens", "sequence_id", "position", "segment")
            }
        _require_known(codes, start, columns)
        part = places[start : start + len(columns["tokens"])]
        part["sequence"], part["position"] = columns["sequence_id"], columns["position"]
        part["token"] = columns["tokens"]
        part["marks"] = np.minimum(columns["segment"], len(SEGMENTS))
        start += len(part)
    ranks = None if _in_order(places) else _sort(places)
    _mark(str(codes.folder), places)
    return _counted(file, places, ranks)


def places_in(file: Path, places: NDArray[np.void]) -> TokenPlaces | None:
    """Of records that are in order already, without their marks of what follows; None if they
    are not, or if two are at one place."""
    if not _in_order(places):
        return None
    try:
        _mark(str(file), places)
    except ValueError:
        return None
    return _counted(file, places, None)


def _require_known(codes: CodeShards, start: int, columns: dict[str, NDArray[np.int64]]) -> None:
    for name in ("tokens", "sequence_id", "position"):
        unknown = columns[name] < 0
        if unknown.any():
            raise ValueError(
                f"{codes.folder}: {name} of row {start + int(unknown.argmax())} is "
                "unknown; a feature database needs tokens, sequence_id and position of every "
                "row (pass them to CodeWriter.write)"
            )


def _pieces(rows: int) -> Iterator[slice]:
    """Slices that overlap by one row."""
    for start in range(0, rows, _ROWS):
        yield slice(start, min(rows, start + _ROWS + 1))


def _in_order(places: NDArray[np.void]) -> bool:
    for piece in _pieces(len(places)):
        sequence, position = places["sequence"][piece], places["position"][piece]
        rises = (np.diff(sequence) > 0) | ((np.diff(sequence) == 0) & (np.diff(position) >= 0))
        if not rises.all():
            return False
    return True


def _sort(places: NDArray[np.void]) -> NDArray[np.uint32]:
    order = np.lexsort((places["position"], places["sequence"]))
    ranks = np.empty(len(order), dtype=np.uint32)
    ranks[order] = np.arange(len(order), dtype=np.uint32)
    places[:] = places[order]
    return ranks


def _mark(source: str, places: NDArray[np.void]) -> None:
    """Notes which rows follow each other; refuses two at one place."""
    for piece in _pieces(len(places)):
        part = places[piece]
        same = part["sequence"][1:] == part["sequence"][:-1]
        step = np.diff(part["position"].astype(np.int64))
        twice = same & (step == 0)
        if twice.any():
            at = part[int(twice.argmax())]
            low = np.searchsorted(places["sequence"], at["sequence"], side="left")
            high = np.searchsorted(places["sequence"], at["sequence"], side="right")
            found = int((places["position"][low:high] == at["position"]).sum())
            raise ValueError(
                f"{source}: {found} rows are at position {at['position']} of sequence "
                f"{at['sequence']}; expected one (give each text that is encoded its own "
                "sequence_id)"
            )
        follows = same & (step == 1)
        part["marks"][1:] |= np.where(follows, _BEFORE, 0).astype(np.uint32)
        part["marks"][:-1] |= np.where(follows, _AFTER, 0).astype(np.uint32)


def _counted(file: Path, places: NDArray[np.void], ranks: NDArray[np.uint32] | None) -> TokenPlaces:
    segments = np.zeros(len(SEGMENTS) + 1, dtype=np.int64)
    positions = np.zeros(len(POSITION_EDGES), dtype=np.int64)
    distinct = np.zeros(0, dtype=np.int32)
    for start in range(0, len(places), _ROWS):
        part = places[start : start + _ROWS]
        segments += np.bincount(part["marks"] & 3, minlength=len(segments))
        bins = np.searchsorted(POSITION_EDGES, part["position"], side="right") - 1
        positions += np.bincount(bins, minlength=len(positions))
        distinct = np.union1d(distinct, part["token"])
    return TokenPlaces(file, len(places), ranks, segments, positions, distinct)
