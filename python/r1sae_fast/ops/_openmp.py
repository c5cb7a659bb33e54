"""Keeps torch's idle threads from taking the cores that Rust works on.

After each parallel operation of torch, libgomp's threads look for the next one for some 15 ms until
they sleep: with as many threads as cores, Rust's get half a core less each meanwhile (top-k of 1024
rows of 28,672 on two cores: 10 ms instead of 6). So they are let go before long work in Rust; torch
makes new ones when it needs them, which takes a tenth of a millisecond.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["release_threads"]

LONG = 1 << 20
"""Numbers read by work that takes much longer than making threads anew."""
_SOFT = 1  # omp_pause_soft: settings are kept


def release_threads(numbers: int) -> None:
    """Lets the calling thread's OpenMP threads go, before work that reads so many numbers."""
    if numbers >= LONG and not _forked and torch.get_num_threads() > 1:
        pause = _pause()
        if pause is not None:
            pause(_SOFT)


@lru_cache(maxsize=1)
def _pause() -> Callable[[int], int] | None:
    """libgomp's own function for it (OpenMP 5.0), where torch runs on libgomp."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        path = next(fields[5] for line in maps if "/libgomp" in (fields := line.split(None, 5))[-1])
        function = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_pause_resource_all
    except (OSError, StopIteration, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    pause: Callable[[int], int] = function
    return pause


def _after_fork() -> None:
    # The threads weren't copied, and waiting for them would hang for ever.
    _forked.append(True)


_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
