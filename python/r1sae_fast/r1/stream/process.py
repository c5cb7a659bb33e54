"""This process's own memory: what it holds, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_LINUX = sys.platform.startswith("linux")


def resident_bytes() -> int | None:
    """Bytes in memory that are this process's own: anonymous and shared pages (RssAnon and
    RssShmem). Pages of mapped files are not counted: the system takes them back when it needs
    them. None where the system does not say (elsewhere than Linux)."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "RssAnon" not in sizes:
        return None
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class MemoryKeeper:
    """Keeps freed memory from piling up.

    The C library's allocator keeps what is freed for the next request, in holes that the next,
    larger request does not fit: a process that takes and frees gigabytes a second grows beyond
    what it ever held. Giving all of it back after every step costs a third of the time (page
    faults); so it is given back only where the step to come might pass the cap.
    """

    def __init__(self, cap: int | None, step: int) -> None:
        """``step``: bytes that a step may take at most. Without a cap nothing is done."""
        self._limit = None if cap is None else max(cap - step, 0)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _LINUX else None
        self._trim = trim  # None: another C library than glibc

    def before_step(self) -> None:
        """To be called before each step."""
        if self._limit is None or self._trim is None:
            return
        held = resident_bytes()
        if held is not None and held > self._limit:
            self._trim(0)
