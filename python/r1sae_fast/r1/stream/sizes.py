"""Sizes as people write and read them: "24GiB", "700 MB"."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)},
}


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GiB" (1024**3), "700MB" (10**6) or "1e9".

    Raises:
        ValueError: no such size, or none above 0.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text.lower())
    try:
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(
            f"{text!r} is no size: expected a number above 0 and a unit, such as 24GiB "
            "(1024^3 bytes), 700MB (10^6) or plain bytes"
        )
    return size


def show_size(size: float) -> str:
    """In GB (10^9) or MB (10^6), as disks and checkpoints are counted."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:,.4g} {unit}" if size < 1e15 else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} B"


def show_time(seconds: float) -> str:
    """The two largest units."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} days"
