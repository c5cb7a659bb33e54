"""One call of an engine with its taps: what the model's hooks reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from r1sae_fast.r1.segments import Segment
from r1sae_fast.r1.taps.tap import Call, Tap
from r1sae_fast.r1.taps.where import Forward, Ints


class SegmentTracker:
    """Tells the segment of each token of a text that is being written.

    As :func:`r1sae_fast.r1.segments.segments` does for whole texts, but for one case: a
    ``</think>`` without a ``<think>`` before it cannot say of tokens already read that they
    were thinking.
    """

    def __init__(self, think_id: int | None, end_think_id: int | None, thinking: bool) -> None:
        self._ids = {think_id: Segment.THINKING} if think_id is not None else {}
        self._end = end_think_id
        self._now = Segment.THINKING if thinking else Segment.RESPONSE
        self._begun = thinking

    def add(self, token: int) -> int:
        """The segment of the next token."""
        if token in self._ids and not self._begun:
            self._begun, self._now = True, Segment.THINKING
        now = self._now
        if self._begun and token == self._end:
            self._now = Segment.RESPONSE
        return int(now)


class BlockTaps:
    """The taps of one block."""

    def __init__(self, run: TapRun) -> None:
        self._run = run
        self._places: dict[str, list[Tap]] = {}

    def add(self, tap: Tap) -> None:
        """In the order in which they are to be applied."""
        self._places.setdefault(tap.point.place, []).append(tap)

    def has(self, place: str) -> bool:
        """Whether a tap is at this place."""
        return place in self._places

    def __call__(self, point: str, value: Tensor) -> Tensor:
        for tap in self._places.get(point, ()):
            value = tap.visit(value, self._run.forward)
        return value


class TapRun:
    """Prepares taps for a call and tells them which tokens each forward reads.

    Args:
        taps: in the order in which they are to be applied.
        call: what they are told at the start.
        segments: of the tokens known at the start, a list a sequence; may be empty where
            :attr:`needs_segments` is False.
        trackers: for the tokens that are written, likewise.
        first: number of the first sequence of the batch under way.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        call: Call,
        segments: Sequence[list[int]] = (),
        trackers: Sequence[SegmentTracker] = (),
    ) -> None:
        self._taps = taps
        self._device = call.device
        self._segments = segments
        self._trackers = trackers
        self._needs_segments = needs_segments(taps)
        self._blocks: dict[int, BlockTaps] = {}
        self.first = 0
        for tap in taps:
            tap.start(call)
            self._blocks.setdefault(tap.point.layer, BlockTaps(self)).add(tap)
        self.forward: Forward

    @property
    def layers(self) -> list[int]:
        """Those with taps."""
        return sorted(self._blocks)

    def at(self, layer: int) -> BlockTaps | None:
        """The taps of a block, None where nothing is attached to it."""
        return self._blocks.get(layer)

    def finish(self) -> None:
        """The call is at its end."""
        for tap in self._taps:
            tap.finish()

    def begin(
        self,
        rows: Sequence[int],
        first: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        width: int | None = None,
        left: bool = False,
    ) -> None:
        """Announces a forward: :class:`r1sae_fast.r1.generate.GenerationTaps`. ``width``: of the
        tensors, if not the largest number of tokens. ``left``: padding stands before the tokens."""
        sequences = np.array(rows, dtype=np.int64) + self.first
        positions = np.array(first, dtype=np.int64)
        lengths = list(map(len, tokens))
        counts = np.array(lengths, dtype=np.int64)
        width = max(lengths, default=0) if width is None else width
        segments: list[list[int]] = []
        if self._needs_segments:
            segments = [
                self._segments_of(int(number), int(position), new)
                for number, position, new in zip(sequences, positions, tokens, strict=True)
            ]
        offsets: Ints | None = width - counts if left else None
        self.forward = Forward(sequences, positions, counts, width, self._device, segments, offsets)

    def _segments_of(self, number: int, position: int, new: Sequence[int]) -> list[int]:
        known = self._segments[number]
        if position < len(known):
            return known[position : position + len(new)]
        return [self._trackers[number].add(token) for token in new]


def needs_segments(taps: Sequence[Tap]) -> bool:
    """Whether a tap chooses tokens by their segments."""
    return any(tap.where.segments is not None for tap in taps)


def make_call(
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[int],
    new: int | None,
) -> Call:
    """A call on sequences of these lengths; ``new``: at most so many tokens are written to each,
    None where none are."""
    expected = sum(lengths) if new is None else sum(lengths) + len(lengths) * min(new, 128)
    return Call(
        hidden_size, dtype, device, len(lengths), None if new is not None else lengths, expected
    )
