"""Which tokens of which sequences a tap is about, and where they are in a forward's tensors."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1sae_fast.r1.segments import Segment

Ints = NDArray[np.int64]
Positions = slice | Sequence[int] | Sequence[Sequence[int]] | None
Segments = str | Segment | Collection["str | Segment"] | None


@dataclass
class Forward:
    """The tokens that one forward reads.

    Attributes:
        sequences: number of each row's sequence, [batch].
        first: position of its first new token, [batch].
        counts: how many of its tokens are new, [batch].
        width: columns of the tensors.
        device: of the tensors.
        segments: of the new tokens, a list a row; empty where no tap asks for them.
        offsets: column of each row's first new token, [batch]; 0 with padding on the right.
    """

    sequences: Ints
    first: Ints
    counts: Ints
    width: int
    device: torch.device
    segments: list[list[int]]
    offsets: Ints | None = None
    found: dict[Where, Index] = field(default_factory=dict)

    def index(self, where: Where) -> Index:
        """The chosen tokens among those of this forward; worked out once for all equal choices."""
        index = self.found.get(where)
        if index is None:
            index = self.found[where] = where.find(self)
        return index

    @cached_property
    def full(self) -> bool:
        """Whether there is no padding."""
        return bool((self.counts == self.width).all())

    def columns(self) -> Ints:
        """Number of a row's new token in each column, [batch, width]; padding below 0 or too
        large."""
        columns = np.broadcast_to(np.arange(self.width), (len(self.counts), self.width))
        return columns if self.offsets is None else columns - self.offsets[:, None]


@dataclass(frozen=True)
class Index:
    """Chosen tokens of a forward.

    Attributes:
        rows: places in ``value.flatten(0, 1)``, int64 [n] on the forward's device; None: all.
        sequence, position: of each, [n].
    """

    rows: Tensor | None
    sequence: Ints
    position: Ints

    def __len__(self) -> int:
        return len(self.sequence)

    def of(self, value: Tensor) -> Tensor:
        """The chosen rows of ``value`` [batch, seq, hidden]: [n, hidden]; a view where all."""
        flat = value.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def put(self, value: Tensor, rows: Tensor) -> Tensor:
        """``value`` with the chosen rows replaced; the others to the bit."""
        if self.rows is None:
            return rows.view_as(value)
        return value.flatten(0, 1).index_copy(0, self.rows, rows).view_as(value)


@dataclass(frozen=True)
class Where:
    """A choice of tokens; what is None chooses all.

    Attributes:
        positions: of the sequence, from 0: a range (start, stop, step; stop None: no end), or a
            tuple of positions for all, or a tuple of them for each sequence.
        segments: values of :class:`Segment`.
        sequences: numbers of sequences.
        starts: one for all, or one for each: tokens from this position on.
    """

    positions: tuple[Any, ...] | range | None = None
    segments: frozenset[int] | None = None
    sequences: frozenset[int] | None = None
    starts: tuple[int, ...] = (0,)

    @cached_property
    def _unrestricted(self) -> bool:
        """Whether :attr:`starts` alone can leave tokens out."""
        return self.positions is None and self.segments is None and self.sequences is None

    @cached_property
    def chooses_all(self) -> bool:
        """Whether no token can be left out."""
        return self._unrestricted and self.starts == (0,)

    def _whole(self, forward: Forward) -> bool:
        """Whether each of the forward's columns is chosen, as far as is seen at once."""
        if not self._unrestricted or not forward.full:
            return False
        if self.chooses_all:
            return True
        return bool((forward.first >= self._starts(forward)).all())

    def _starts(self, forward: Forward) -> Ints:
        """Of each row of the forward, [batch] or [1]."""
        starts = np.asarray(self.starts)
        return starts[forward.sequences] if len(starts) > 1 else starts

    def check(self, count: int, lengths: Sequence[int] | None) -> None:
        """Raises ValueError if this does not fit ``count`` sequences of these ``lengths`` (None:
        they are still being written)."""
        if len(self.starts) not in (1, count):
            raise ValueError(f"start has {len(self.starts)} entries, expected 1 or {count}")
        outside = [number for number in self.sequences or () if not 0 <= number < count]
        if outside:
            raise ValueError(
                f"sequence {outside[0]} does not exist: there are {count}, counted from 0"
            )
        if self._for_each and len(self.positions or ()) != count:
            raise ValueError(
                f"positions are given for {len(self.positions or ())} sequences, expected {count}"
            )
        if isinstance(self.positions, tuple):
            self._check_positions(count, lengths)

    def _check_positions(self, count: int, lengths: Sequence[int] | None) -> None:
        for number in range(count) if self.sequences is None else sorted(self.sequences):
            for position in self._own_positions(number):
                if lengths is None and position < 0:
                    raise ValueError(
                        f"position {position} counts from the end, which is not known while "
                        "text is generated; give positions from 0 on"
                    )
                if lengths is not None and not -lengths[number] <= position < lengths[number]:
                    raise ValueError(
                        f"position {position} is out of range: sequence {number} has "
                        f"{lengths[number]} tokens"
                    )

    def _own_positions(self, number: int) -> tuple[int, ...]:
        assert isinstance(self.positions, tuple)
        own: tuple[int, ...] = self.positions[number] if self._for_each else self.positions
        return own

    @cached_property
    def _hash(self) -> int:
        return hash((self.positions, self.segments, self.sequences, self.starts))

    def __hash__(self) -> int:
        return self._hash  # asked for in every step

    @property
    def _for_each(self) -> bool:
        positions = self.positions
        return isinstance(positions, tuple) and any(isinstance(p, tuple) for p in positions)

    def find(self, forward: Forward) -> Index:
        """The chosen tokens, in the order of sequences and positions."""
        whole = self._whole(forward)
        if whole and forward.width == 1:  # a step of a generation: this is its hot path
            return Index(None, forward.sequences, forward.first)
        columns = forward.columns()
        positions = columns + forward.first[:, None]
        if whole:
            return Index(None, forward.sequences.repeat(forward.width), positions.ravel())
        chosen = (columns >= 0) & (columns < forward.counts[:, None])
        if self.starts != (0,):
            chosen = chosen & (positions >= self._starts(forward)[:, None])
        if self.sequences is not None:
            chosen = chosen & np.isin(forward.sequences, list(self.sequences))[:, None]
        if self.segments is not None:
            chosen = chosen & self._in_segments(forward, columns, chosen)
        if self.positions is not None:
            chosen = chosen & self._at_positions(forward, positions)
        sequences = np.broadcast_to(forward.sequences[:, None], chosen.shape)
        if chosen.all():
            return Index(None, sequences.ravel(), positions.ravel())
        (places,) = chosen.ravel().nonzero()
        rows = torch.from_numpy(places)
        if forward.device.type != "cpu":
            rows = rows.to(forward.device, non_blocking=True)
        return Index(rows, sequences.ravel()[places], positions.ravel()[places])

    def _in_segments(
        self, forward: Forward, columns: Ints, real: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        values = np.full(columns.shape, -1, dtype=np.int64)
        values[(columns >= 0) & (columns < forward.counts[:, None])] = [
            segment for row in forward.segments for segment in row
        ]
        wanted: NDArray[np.bool_] = np.isin(values, list(self.segments or ()))
        return wanted

    def _at_positions(self, forward: Forward, positions: Ints) -> NDArray[np.bool_]:
        if isinstance(self.positions, range):
            start, stop, step = self.positions.start, self.positions.stop, self.positions.step
            inside = (positions >= start) & (positions < stop) & ((positions - start) % step == 0)
            return np.asarray(inside)
        ends = forward.first + forward.counts
        wanted = np.zeros(positions.shape, dtype=np.bool_)
        for row, number in enumerate(forward.sequences):
            own = self._own_positions(int(number))
            at = [position + ends[row] if position < 0 else position for position in own]
            wanted[row] = np.isin(positions[row], at)
        return wanted


_NO_END = 2**62


def make_where(
    *,
    positions: Positions = None,
    segments: Segments = None,
    sequences: Iterable[int] | None = None,
    start: int | Sequence[int] = 0,
) -> Where:
    """The choice that these describe; see :class:`r1sae_fast.r1.taps.Capture`.

    Raises:
        ValueError: an unknown segment, or a negative start.
        TypeError: positions that are no integers.
    """
    starts = (start,) if isinstance(start, int) else tuple(operator.index(s) for s in start)
    if any(s < 0 for s in starts):
        raise ValueError(f"start is {min(starts)}, expected a position of 0 or more")
    chosen: Any = None
    if isinstance(positions, slice):
        begin, stop, step = positions.start or 0, positions.stop, positions.step or 1
        if begin < 0 or (stop is not None and stop < 0) or step < 1:
            raise ValueError(
                f"positions is {positions}; expected a slice that counts from the beginning, "
                "or a list of positions (-1 is the last)"
            )
        chosen = range(begin, _NO_END if stop is None else stop, step)
    elif positions is not None:
        chosen = tuple(map(_integers, positions))
    return Where(
        positions=chosen,
        segments=None if segments is None else _segments(segments),
        sequences=None if sequences is None else frozenset(map(operator.index, sequences)),
        starts=starts,
    )


def _integers(value: Any) -> Any:
    if isinstance(value, Iterable):
        return tuple(map(operator.index, value))
    return operator.index(value)


def _segments(segments: str | Segment | Collection[str | Segment]) -> frozenset[int]:
    given = [segments] if isinstance(segments, (str, Segment)) else list(segments)
    known = {segment.name.lower(): int(segment) for segment in Segment}
    values = set()
    for one in given:
        value = known.get(one.lower()) if isinstance(one, str) else int(one)
        if value not in known.values():
            raise ValueError(f"segment {one!r} is unknown; expected one of {', '.join(known)}")
        assert value is not None
        values.add(value)
    return frozenset(values)
