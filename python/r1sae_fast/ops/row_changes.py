"""What an optimiser tells those who keep a copy of its weights: which rows it has moved."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowChanges"]


class RowChanges:
    """The rows of a matrix that have moved from one version of it to another.

    Versions are torch's count of in-place changes (``Tensor._version``). A change that nobody notes
    breaks the chain, and then no answer is given: so it is never a wrong one.

    Args:
        rows: of the matrix.
    """

    def __init__(self, rows: int) -> None:
        self._moved = torch.zeros(rows, dtype=torch.bool)
        # All changes between these versions are noted.
        self._from = self._to = -1

    def note(self, before: int, after: int, moved: Tensor | None) -> None:
        """Between two versions only rows in the mask ``moved [rows]`` changed; None: any may."""
        if moved is None:
            self._start(after)
            return
        if before != self._to:
            self._start(before)
        self._moved |= moved
        self._to = after

    def take(self, copied: int, now: int) -> Tensor | None:
        """The numbers of rows that may differ between two versions, int64, rising; None where that
        isn't known. What was noted is forgotten."""
        if copied == now:
            return torch.empty(0, dtype=torch.int64)
        known = self._from <= copied <= now == self._to
        found = self._moved.nonzero().flatten() if known else None
        self._start(now)
        return found

    def _start(self, version: int) -> None:
        self._from = self._to = version
        self._moved.zero_()
