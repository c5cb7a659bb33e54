"""A value and its place in one integer, so that one sort orders by value, ties by lower place."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["key_of", "place_of", "value_of"]


@triton.jit
def key_of(values, places):
    """int64 keys that rise with ``values`` (float32, none below 0, no NaN) and fall with int32
    ``places``: bits of floats from 0 up are ordered as the floats are."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64)
    return (bits << 32) | (0x7FFFFFFF - places).to(tl.int64)


@triton.jit
def value_of(keys):
    """The float32 values."""
    return (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def place_of(keys):
    """The int32 places."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
