"""The k-th largest of many numbers, by radix: four passes of eight bits; no wait for the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["kth_value", "kth_value_traffic"]


@triton.jit
def radix_count_kernel(
    numbers, state, histogram, count, shift, BLOCK: tl.constexpr, REPEAT: tl.constexpr
):
    """Counts the byte at ``shift`` of the numbers that share the bits found so far."""
    prefix = tl.load(state)
    total = tl.zeros([256], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK * REPEAT
    for part in range(REPEAT):
        place = first + part * BLOCK + tl.arange(0, BLOCK)
        number = tl.load(numbers + place, mask=place < count, other=0.0).to(tl.float32)
        bits = number.to(tl.int32, bitcast=True)
        # Two shifts: one by 32 would be undefined.
        shares = (place < count) & (((bits >> shift) >> 8) == ((prefix >> shift) >> 8))
        byte = (bits >> shift) & 0xFF
        total += tl.histogram(byte, 256, mask=shares)
    # Whole numbers: the order of the additions can't show.
    tl.atomic_add(histogram + tl.arange(0, 256), total, mask=total > 0)


@triton.jit
def radix_choose_kernel(state, wanted, histogram, shift):
    """Finds the byte that holds the k-th largest; what is left of k counts within it."""
    byte = tl.arange(0, 256)
    counts = tl.load(histogram + byte).to(tl.int64)
    k = tl.load(wanted)
    above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
    chosen = tl.max(tl.where(above + counts >= k, byte, -1), axis=0)
    before = tl.sum(tl.where(byte == chosen, above, 0), axis=0)
    # Fewer than k numbers: the bits stay 0.
    prefix = tl.load(state)
    tl.store(state, tl.where(chosen >= 0, prefix | (tl.maximum(chosen, 0) << shift), 0))
    tl.store(wanted, tl.where(chosen >= 0, k - before, 0x7FFFFFFFFFFFFFFF))
    tl.store(histogram + byte, tl.zeros([256], tl.int32))


def kth_value(numbers: Tensor, k: int) -> Tensor:
    """The k-th largest, float32 ``[1]`` on the device; 0 where there are fewer than k.

    Args:
        numbers: float32, bfloat16 or float16 ``[n]``, none below 0, no NaN.
        k: at least 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    state = numbers.new_zeros(1, dtype=torch.int32)
    wanted = numbers.new_full((1,), k, dtype=torch.int64)
    histogram = numbers.new_zeros(256, dtype=torch.int32)
    settings = config("kth_value", numbers.device)
    size = settings.blocks["BLOCK"] * settings.blocks["REPEAT"]
    count = numbers.shape[0]
    for shift in (24, 16, 8, 0):
        launch(
            radix_count_kernel,
            (triton.cdiv(count, size),),
            numbers,
            state,
            histogram,
            count,
            shift,
            **settings.options,
        )
        launch(radix_choose_kernel, (1,), state, wanted, histogram, shift, num_warps=4)
    return state.view(torch.float32)


def kth_value_traffic(count: int, *, itemsize: int = 4) -> Traffic:
    """Of :func:`kth_value`: four passes."""
    return Traffic(hbm_read=4.0 * count * itemsize, l2_read=4.0 * count * itemsize)
