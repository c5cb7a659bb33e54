"""Which instruction set the Rust paths run on."""

from __future__ import annotations

from typing import NamedTuple

from r1sae_fast import _core


class SimdInfo(NamedTuple):
    """What :func:`simd_info` tells."""

    active: str
    """The level in use: ``scalar``, ``avx2`` or ``avx512``."""
    available: tuple[str, ...]
    """All levels that this CPU has, slowest first."""


def simd_info() -> SimdInfo:
    """The level in use and those this CPU has.

    The widest is chosen at first use, or the one that the environment variable ``R1SAE_SIMD``
    names.

    Raises:
        ValueError: ``R1SAE_SIMD`` names no level of this CPU.
    """
    active, available = _core.simd_info()
    return SimdInfo(active, tuple(available))


def set_simd(level: str) -> str:
    """Forces a level for the whole process (``auto``: the widest); returns the one now in use.

    Raises:
        ValueError: an unknown level, or one that this CPU lacks.
    """
    return _core.set_simd(level)
