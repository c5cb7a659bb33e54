"""Where a run's time goes."""

from __future__ import annotations

import time

PARTS = ("data", "forward", "backward", "optimizer")
"""Waiting for rows; encoding, decoding and loss; gradients; clipping and Adam. What is left over is
metrics, checkpoints and the like."""


class Clock:
    """Adds up the seconds of each part. On a GPU these are the host's: work that is queued counts
    where the host waits for it."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what it has counted."""
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.started = self._last = time.perf_counter()

    def lap(self, part: str | None = None) -> None:
        """What went by since the last lap was this part; None: something else."""
        now = time.perf_counter()
        if part is not None:
            self.spent[part] += now - self._last
        self._last = now

    def add(self, part: str, seconds: float) -> None:
        """Counts what was measured elsewhere."""
        self.spent[part] += seconds

    def shares(self) -> dict[str, float]:
        """Of the seconds since the (re)start, each part's."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        return {part: seconds / elapsed for part, seconds in self.spent.items()}
