"""How much memory this machine has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that may be allocated without swapping, the system's file caches counted as free, and
    within a container's limit; None where the system does not say."""
    limits = [limit for limit in (_of_system(), _of_container(_CGROUP)) if limit is not None]
    return min(limits, default=None)


def _of_container(folder: Path) -> int | None:
    """What a control group (version 2) has left; its file caches can be taken back."""
    try:
        most = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        if most == "max":
            return None
        text = (folder / "memory.stat").read_text(encoding="ascii")
        caches = sum(int(n) for name, n in _pairs(text) if name == "inactive_file")
        return max(int(most) - used + caches, 0)
    except (OSError, ValueError):
        return None


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        yield name, number


def _of_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
