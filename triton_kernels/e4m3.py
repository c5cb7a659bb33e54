"""float8 e4m3 (NVIDIA's ``e4m3fn``, as in R1's checkpoint) to and from wider floats, bit by bit.

On every architecture, those without the type too, and the same bits everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["E4M3_MAX", "e4m3_to_float16", "e4m3_to_float32", "float32_to_e4m3"]

E4M3_MAX = 448.0


@triton.jit
def e4m3_to_float16(bits):
    """From the byte. Exact; NaN becomes 480 (no weight is NaN, and activations are checked).

    Exponent and mantissa sit in a float16's with the bias 15 instead of 7, subnormals too: that
    is 2^8 too small.
    """
    half = ((bits & 0x7F).to(tl.int16) << 7).to(tl.float16, bitcast=True) * 256.0
    return tl.where(bits >= 128, -half, half).to(tl.float16)


@triton.jit
def e4m3_to_float32(bits):
    """From the byte. Exact, but for NaN: see :func:`e4m3_to_float16`."""
    half = ((bits & 0x7F).to(tl.int16) << 7).to(tl.float16, bitcast=True)
    magnitude = half.to(tl.float32) * 256.0
    return tl.where(bits >= 128, -magnitude, magnitude)


@triton.jit
def float32_to_e4m3(x):
    """To the byte, to nearest, ties to even, as torch; |x| at most 464, no NaN."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: 20 of 23 bits of mantissa go, the exponent's bias falls from 127 to 7.
    odd = (magnitude >> 20) & 1
    normal = ((magnitude + 0x7FFFF + odd) >> 20) - ((127 - 7) << 3)
    # Subnormal ones are multiples of 2^-9: adding 2^14 makes float32 round to those.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    byte = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (byte | sign).to(tl.uint8)
