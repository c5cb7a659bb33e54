"""Bytes and arithmetic of a launch: what a kernel must move at least as it is written.

Computed from shapes alone. Reads that the launch order makes hit in the L2 cache are counted apart
from what comes from global memory (HBM).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Traffic"]


@dataclass(frozen=True)
class Traffic:
    """Of one call of a launcher; add those of its parts."""

    hbm_read: float = 0
    """Bytes from global memory, each cached tile counted once."""
    hbm_written: float = 0
    l2_read: float = 0
    """Bytes that the programs ask for, cached or not."""
    flops: float = 0
    """Multiply and add count as two."""
    scratch: float = 0
    """Bytes of temporary global memory held at once."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.hbm_read + other.hbm_read,
            self.hbm_written + other.hbm_written,
            self.l2_read + other.l2_read,
            self.flops + other.flops,
            max(self.scratch, other.scratch),
        )

    @property
    def hbm(self) -> float:
        """Bytes to and from global memory."""
        return self.hbm_read + self.hbm_written
