"""Work in Rust beside torch's threads.

After each parallel operation of torch, libgomp's threads look for the next one for some 15 ms until
they sleep: with as many threads as cores, threads of Rust's own would get half a core less each
meanwhile (top-k of 1024 rows of 28,672 on two cores: 10 ms instead of 6). So Rust works on torch's
threads, which are awake, where it is called on the main thread. Another thread has threads of its
own in libgomp: there they are let go before long work in Rust; torch makes new ones when it needs
them, which takes a tenth of a millisecond.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from r1sae_fast import _core

__all__ = ["release_threads"]

LONG = 1 << 20
"""Numbers read by work that takes much longer than making threads anew."""
_SOFT = 1  # omp_pause_soft: settings are kept
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[^/]*$")


def release_threads(numbers: int) -> None:
    """Before work in Rust that reads so many numbers: shares the calling thread's OpenMP threads
    with it, or lets them go."""
    if _forked or torch.get_num_threads() == 1:
        return
    if threading.get_native_id() == os.getpid() and _share():
        return
    if numbers >= LONG:
        _pause()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The libgomp that torch runs on; None where it runs on another."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        files = [fields[5] for line in maps if len(fields := line.split(None, 5)) == 6]
        path = _of_torch(dict.fromkeys(files))
        return ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW) if path else None
    except OSError:
        return None


def _of_torch(files: Iterable[str]) -> str | None:
    """Torch's libgomp among the files that are loaded: the one that came with it or, where it came
    with none of any kind and the process has a single one, that. Others are other packages' own."""
    torch_home = str(Path(torch.__file__).parent)
    all_openmp = [path for path in files if _OPENMP.search(path)]
    packed = [
        path for path in all_openmp if path.startswith((torch_home + "/", torch_home + ".libs/"))
    ]
    found = packed or all_openmp
    return found[0] if len(found) == 1 and "/libgomp" in found[0] else None


@lru_cache(maxsize=1)
def _share() -> bool:
    """Whether Rust works on the main thread's OpenMP threads."""
    parallel = getattr(_library(), "GOMP_parallel", None)
    address = ctypes.cast(parallel, ctypes.c_void_p).value if parallel is not None else None
    if address is not None:
        _core.share_openmp(address)
    return address is not None


def _pause() -> None:
    """Lets the calling thread's OpenMP threads go, by libgomp's own function (OpenMP 5.0)."""
    pause = getattr(_library(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


def _after_fork() -> None:
    # The threads weren't copied, and waiting for them would hang for ever.
    _forked.append(True)


_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
