"""Which rows were added, so that none is counted twice."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import torch
from torch import Tensor


class RowRanges:
    """Disjoint ranges of rows; neighbours are joined, so rows in order cost nothing."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []

    @classmethod
    def of_tensor(cls, tensor: Tensor) -> RowRanges:
        """From what :meth:`to_tensor` gave.

        Raises:
            ValueError: not ranges that rise and leave gaps.
        """
        ranges = cls()
        ranges.starts, ranges.stops = tensor[:, 0].tolist(), tensor[:, 1].tolist()
        bounds = [bound for pair in tensor.tolist() for bound in pair]
        if any(low >= high for low, high in pairwise([-1, *bounds])):
            raise ValueError("its row_ranges are not in order")
        return ranges

    def to_tensor(self) -> Tensor:
        """``[ranges, 2]`` int64: the first row of each, and the one after its last."""
        pairs = torch.tensor([self.starts, self.stops], dtype=torch.int64)
        return pairs.reshape(2, -1).T.contiguous()

    def count(self) -> int:
        """How many rows."""
        return sum(self.stops) - sum(self.starts)

    def add(self, start: int, stop: int) -> None:
        """Adds the rows ``start`` to ``stop - 1``.

        Raises:
            ValueError: some of them were added before; nothing is added.
        """
        if start >= stop:
            return
        at = bisect_right(self.starts, start)
        overlap = start if at and self.stops[at - 1] > start else None
        if overlap is None and at < len(self.starts) and self.starts[at] < stop:
            overlap = self.starts[at]
        if overlap is not None:
            raise ValueError(
                f"codes of the rows {start}..{stop} hold row {overlap}, which other codes held "
                "already: it would be counted twice; give each batch its own first_row"
            )
        joins_before = at > 0 and self.stops[at - 1] == start
        joins_after = at < len(self.starts) and self.starts[at] == stop
        if joins_before and joins_after:
            self.stops[at - 1] = self.stops.pop(at)
            del self.starts[at]
        elif joins_before:
            self.stops[at - 1] = stop
        elif joins_after:
            self.starts[at] = start
        else:
            self.starts.insert(at, start)
            self.stops.insert(at, stop)
