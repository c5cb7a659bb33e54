"""Memory of this process: its peak, and what of it is its own rather than mapped files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")


def field(name: str) -> int:
    """Bytes that Linux tells under that name (VmHWM: the peak; RssAnon: without mapped files)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}; this needs Linux")


class PeakAnonymous:
    """The most memory of its own that the process had at any of the moments it was looked at.

    Pages of mapped files are left out: they are the page cache's, and go when others need them.
    """

    def __init__(self, seconds: float = 0.005, read: Callable[[], int] | None = None) -> None:
        self._seconds = seconds
        self._read = read or (lambda: field("RssAnon"))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.peak = 0

    def __enter__(self) -> PeakAnonymous:
        self.before = self.peak = self._read()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._read())

    @property
    def grown(self) -> int:
        """Bytes above those at the start."""
        return self.peak - self.before

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            self.peak = max(self.peak, self._read())
