"""Which rows were added, so that none is counted twice."""

from __future__ import annotations

from bisect import bisect_right


class RowRanges:
    """Disjoint ranges of rows; neighbours are joined, so rows in order cost nothing."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []

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
                f"codes of the rows {start}..{stop} hold row {overlap}, which earlier codes held "
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
