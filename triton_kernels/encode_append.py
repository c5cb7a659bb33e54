"""Row top-k without a scratch of pre-activations: what may be chosen is appended to a short list.

The k-th largest of the first sixteenth of a row's pre-activations bounds the whole row's from
below. The rest of the products then append what reaches the bound, about 16 k numbers a row. Where
a row's list overflows, nothing is certain and the whole call is done again with the scratch
(:mod:`r1sae_fast.triton_kernels.encode_topk`, the default: it waits for nothing). The order in
which programs append does not show: the codes are sorted by value and feature.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.encode_topk import (
    MOST_K,
    PaddedCodes,
    encode_topk,
    padded_codes,
)
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.order_key import key_of, place_of, value_of
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["encode_append", "encode_append_traffic"]

SAMPLE = 16
"""One in so many features makes the bound."""


@triton.jit
def append_kernel(
    x,
    W_enc,
    b_enc,
    bounds,
    lists,
    lengths,
    rows,
    d_in,
    d_sae,
    capacity,
    k,
    W_stride_in,
    W_stride_sae,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    program = tl.program_id(0)
    n_tiles = tl.cdiv(d_sae, BLOCK_N)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    band = program // (GROUP_M * n_tiles)
    height = tl.minimum(m_tiles - band * GROUP_M, GROUP_M)
    m_tile = band * GROUP_M + (program % (GROUP_M * n_tiles)) % height
    n_tile = (program % (GROUP_M * n_tiles)) // height

    row = (m_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    feature = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_features = row < rows, feature < d_sae
    wide_feature = feature.to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    left = x + row[:, None] * d_in + inner[None, :]
    right = W_enc + wide_feature[None, :] * W_stride_sae + inner[:, None] * W_stride_in
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        present = inner < d_in - start
        a = tl.load(left, mask=in_rows[:, None] & present[None, :], other=0.0)
        b = tl.load(right, mask=present[:, None] & in_features[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K * W_stride_in
    dtype = x.dtype.element_ty
    if HAS_BIAS:
        bias = tl.load(b_enc + feature, mask=in_features, other=0.0).to(tl.float32)
        total = total.to(dtype).to(tl.float32) + bias[None, :]
    pre = total.to(dtype).to(tl.float32)
    bound = tl.load(bounds + row * k + (k - 1), mask=in_rows, other=0.0).to(tl.float32)
    kept = (pre > 0.0) & (pre >= bound[:, None]) & in_rows[:, None] & in_features[None, :]
    counted = kept.to(tl.int32)
    found = tl.sum(counted, axis=1)
    begin = tl.atomic_add(lengths + row, found, mask=in_rows & (found > 0))
    place = begin[:, None] + tl.cumsum(counted, axis=1) - 1
    key = key_of(pre, tl.broadcast_to(feature[None, :], BLOCK_M, BLOCK_N))
    tl.store(lists + row[:, None] * capacity + place, key, mask=kept & (place < capacity))


@triton.jit
def select_listed_kernel(
    lists, lengths, values, indices, counts, capacity, k, CAPACITY: tl.constexpr, K: tl.constexpr
):
    """The k largest keys of a row's list; no two are equal, so their cut is exact."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    place = tl.arange(0, CAPACITY)
    keys = tl.load(lists + row * capacity + place, mask=place < length, other=0)
    least = tl.full([], 0, tl.int64)
    for step in range(0, 63):
        tried = least | (tl.full([], 1, tl.int64) << (62 - step))
        reached = tl.sum((keys >= tried).to(tl.int32), axis=0)
        least = tl.where(reached >= k, tried, least)
    kept = (keys >= least) & (keys > 0)
    count = tl.sum(kept.to(tl.int32), axis=0)
    spot = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    # All keys are in registers: the list's own room holds what was kept.
    tl.debug_barrier()
    tl.store(lists + row * capacity + spot, keys, mask=kept)
    tl.debug_barrier()
    slot = tl.arange(0, K)
    mine = tl.load(lists + row * capacity + slot, mask=slot < count, other=0)
    before = tl.zeros([K], tl.int32)
    for start in range(0, count):
        theirs = tl.load(lists + row * capacity + start)
        before += (theirs > mine).to(tl.int32)
    target = row * k + tl.where(slot < count, before, slot)
    tl.store(values + target, value_of(mine).to(values.dtype.element_ty), mask=slot < k)
    none = tl.zeros([K], tl.int32)
    tl.store(indices + target, tl.where(slot < count, place_of(mine), none), mask=slot < k)
    tl.store(counts + row, count)


def encode_append(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *, capacity: int | None = None
) -> tuple[PaddedCodes, bool]:
    """As :func:`r1sae_fast.triton_kernels.encode_topk.encode_topk`, with lists instead of a
    scratch.

    Args:
        x, W_enc, b_enc, k: as there; k from 1.
        capacity: numbers a row's list holds, a power of two; default 32 k, from 256 to 4,096.

    Returns:
        ``(codes, redone)``: whether a list overflowed. Waits for the GPU once, to know.
    """
    rows, d_in = x.shape
    d_sae = W_enc.shape[1]
    if not 1 <= k <= min(d_sae, MOST_K):
        raise ValueError(f"k is {k}; expected 1 to {min(d_sae, MOST_K)}")
    if capacity is None:
        capacity = min(max(triton.next_power_of_2(32 * k), 256), 4096)
    if capacity < k or capacity & (capacity - 1):
        raise ValueError(f"capacity is {capacity}; expected a power of two, at least k")
    x = x.contiguous()
    sampled = max(d_sae // SAMPLE, min(k, d_sae))
    bias = None if b_enc is None else b_enc[:sampled]
    bounds = encode_topk(x, W_enc[:, :sampled], bias, k).values
    lists = x.new_empty(rows, capacity, dtype=torch.int64)
    lengths = x.new_zeros(rows, dtype=torch.int32)
    settings = config("encode_append", x.device)
    blocks = settings.blocks
    grid = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(d_sae, blocks["BLOCK_N"])
    launch(
        append_kernel,
        (grid,),
        x,
        W_enc,
        x if b_enc is None else b_enc,
        bounds,
        lists,
        lengths,
        rows,
        d_in,
        d_sae,
        capacity,
        k,
        W_enc.stride(0),
        W_enc.stride(1),
        HAS_BIAS=b_enc is not None,
        GROUP_M=8,
        **settings.options,
    )
    if _uncertain(lengths, bounds[:, k - 1], k, capacity):
        return encode_topk(x, W_enc, b_enc, k), True
    out = padded_codes(x, k)
    launch(
        select_listed_kernel,
        (rows,),
        lists,
        lengths,
        out.values,
        out.indices,
        out.counts,
        capacity,
        k,
        CAPACITY=capacity,
        K=triton.next_power_of_2(k),
        **config("select_listed", x.device).options,
    )
    return out, False


def _uncertain(lengths: Tensor, bounds: Tensor, k: int, capacity: int) -> bool:
    """Whether a list overflowed, or lacks what its own bound promised: the two products' sums are
    in different orders, so that the k-th of the sample may lie below itself."""
    if lengths.device.type == "meta":  # without data (ahead of time) nothing is
        return False
    return bool(((lengths > capacity) | ((bounds > 0) & (lengths < k))).any())


def encode_append_traffic(
    rows: int, d_in: int, d_sae: int, k: int, *, itemsize: int = 2, capacity: int = 2048
) -> Traffic:
    """Of :func:`encode_append` without overflow: the products of 17 sixteenths of the features."""
    listed = rows * SAMPLE * k * 8
    return Traffic(
        hbm_read=rows * d_in * itemsize * 2 + d_sae * d_in * itemsize * 17 / 16 + listed,
        hbm_written=listed + rows * (k * (itemsize + 4) + 4) + rows * d_sae / SAMPLE * itemsize,
        l2_read=rows * d_in * d_sae * itemsize * (1 / 128 + 1 / 128),
        flops=2.0 * rows * d_in * d_sae * 17 / 16,
        scratch=rows * capacity * 8 + 1024 * d_sae / SAMPLE * itemsize,
    )
