"""The k largest pre-activations of each row, exactly, without dense codes.

The top k of a row lie in the k groups of neighbouring features with the largest maxima (ties: the
first): every other group is beaten by k of them. So selection reads the maxima and k groups a row.
Twin of :func:`r1sae_fast.ops.topk`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import Config, config
from r1sae_fast.triton_kernels.encode_gemm import (
    CHUNK,
    Chunk,
    chunk_buffers,
    encode_chunk,
    encode_chunk_traffic,
)
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.order_key import key_of, place_of, value_of
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = [
    "MOST_K",
    "PaddedCodes",
    "encode_topk",
    "encode_topk_traffic",
    "group_for",
    "padded_codes",
    "select_topk",
    "select_topk_traffic",
]

MOST_K = 512
"""Above, a program's candidates no longer fit its registers; the reference serves."""


@triton.jit
def kth_largest(bits, k, LOW: tl.constexpr):
    """The k-th largest of int32 ``bits`` (none negative), built from the highest bit down; bits
    below ``LOW`` are 0 in all of them. 0 where there are fewer than k."""
    found = tl.full([], 0, tl.int32)
    for step in range(0, 31 - LOW):
        tried = found | (1 << (30 - step))
        reached = tl.sum((bits >= tried).to(tl.int32), axis=0)
        found = tl.where(reached >= k, tried, found)
    return found


@triton.jit
def first_k(bits, k, LOW: tl.constexpr):
    """Which of ``bits`` are its k largest, ties to the first."""
    least = kth_largest(bits, k, LOW)
    above = bits > least
    tied = bits == least
    room = k - tl.sum(above.to(tl.int32), axis=0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))


@triton.jit
def select_topk_kernel(
    scratch,
    maxima,
    values,
    indices,
    counts,
    keys,
    first_row,
    d_sae,
    groups,
    k,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = (first_row + row) * k
    place = tl.arange(0, K)

    # The k groups that can hold the top k, in order of features, noted where the codes will be.
    group = tl.arange(0, GROUPS)
    highest = tl.load(maxima + row * groups + group, mask=group < groups, other=0.0)
    in_use = tl.minimum(k, groups)
    bits = tl.where(group < groups, highest.to(tl.float32).to(tl.int32, bitcast=True), -1)
    chosen = first_k(bits, in_use, LOW)
    spot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(indices + own + spot, group, mask=chosen)
    tl.debug_barrier()
    slot = tl.arange(0, CHOSEN)
    used = tl.load(indices + own + slot, mask=slot < in_use, other=0)
    column = used[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (slot < in_use)[:, None] & (column < d_sae)
    pre = tl.load(scratch + row * d_sae + column, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()

    # Their k largest, ties to the lower feature, in order of features.
    flat = tl.reshape(pre.to(tl.int32, bitcast=True), [CHOSEN * GROUP])
    kept = first_k(flat, k, LOW) & (flat > 0)
    spot = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    feature = tl.reshape(column, [CHOSEN * GROUP])
    key = key_of(flat.to(tl.float32, bitcast=True), feature)
    count = tl.sum(kept.to(tl.int32), axis=0)
    tl.store(keys + row * k + spot, key, mask=kept)
    tl.debug_barrier()

    # By falling value: a code's place is how many are before it. No two keys are equal.
    mine = tl.load(keys + row * k + place, mask=place < count, other=0)
    before = tl.zeros([K], tl.int32)
    for start in range(0, count, BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs = tl.load(keys + row * k + other, mask=other < count, other=0)
        before += tl.sum((theirs[None, :] > mine[:, None]).to(tl.int32), axis=1)
    target = own + tl.where(place < count, before, place)
    dtype = values.dtype.element_ty
    tl.store(values + target, value_of(mine).to(dtype), mask=place < k)
    none = tl.zeros([K], tl.int32)
    tl.store(indices + target, tl.where(place < count, place_of(mine), none), mask=place < k)
    tl.store(counts + first_row + row, count)


class PaddedCodes:
    """k places a row, of which the first ``counts`` are codes and the others hold value 0.

    Attributes:
        values: ``[rows, k]``, falling.
        indices: int32 ``[rows, k]``; 0 where there is no code.
        counts: int32 ``[rows]``.
        bad_row: int32 ``[1]``, the first row with a NaN or an infinity, if that was checked.
    """

    def __init__(self, values: Tensor, indices: Tensor, counts: Tensor, bad_row: Tensor) -> None:
        self.values, self.indices = values, indices
        self.counts, self.bad_row = counts, bad_row

    def compact(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(values [nnz], indices [nnz], row_offsets int64 [rows + 1])``; waits for the GPU."""
        offsets = self.counts.new_zeros(self.counts.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(self.counts, 0, out=offsets[1:])
        kept = self.values > 0
        return self.values[kept], self.indices[kept], offsets


def padded_codes(x: Tensor, k: int, bad_row: Tensor | None = None) -> PaddedCodes:
    """Room for k codes of each row of ``x``."""
    rows = x.shape[0]
    return PaddedCodes(
        x.new_empty(rows, k),
        x.new_empty(rows, k, dtype=torch.int32),
        x.new_empty(rows, dtype=torch.int32),
        x.new_zeros(1, dtype=torch.int32) if bad_row is None else bad_row,
    )


def select_topk(chunk: Chunk, out: PaddedCodes, rows: int, k: int) -> None:
    """Writes the k largest of each of a chunk's first ``rows`` rows to ``out``; k at most 512, and
    at most 128 in groups of 32."""
    keys = chunk.scratch.new_empty(rows, k, dtype=torch.int64)
    _select(chunk, out, keys, 0, rows, k)


def group_for(k: int) -> int:
    """Features a group: fewer where many groups are chosen, to bound a program's candidates."""
    return 32 if k <= 128 else 16


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    check_finite: bool = False,
    out: PaddedCodes | None = None,
    chunk: Chunk | None = None,
    keys: Tensor | None = None,
) -> PaddedCodes:
    """The k largest positive values of ``relu(x @ W_enc + b_enc)`` in each row, ties to the lower
    feature.

    Args:
        x: float32, bfloat16 or float16 ``[rows, d_in]``.
        W_enc: ``[d_in, d_sae]`` in the dtype of x, strided either way.
        b_enc: ``[d_sae]``.
        k: 0 to ``min(d_sae, 512)``.
        check_finite: fill ``bad_row``.
        out, chunk, keys: buffers to use, for calls that must allocate nothing (``keys`` int64
            ``[rows of the chunk, k]``).

    Nothing waits for the GPU.
    """
    rows, d_sae = x.shape[0], W_enc.shape[1]
    if not 0 <= k <= min(d_sae, MOST_K):
        raise ValueError(f"k is {k}; expected 0 to {min(d_sae, MOST_K)}")
    x = x.contiguous()
    if chunk is None:
        chunk = chunk_buffers(x, rows, d_sae, group_for(k))
    if out is None:
        out = padded_codes(x, k, chunk.bad_row)
    if k == 0:
        out.counts.zero_()
    if keys is None:
        keys = x.new_empty(min(rows, CHUNK), k, dtype=torch.int64)
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        encode_chunk(x, W_enc, b_enc, chunk, first, count, check_finite=check_finite)
        if k:
            _select(chunk, out, keys, first, count, k)
    return out


def _select(chunk: Chunk, out: PaddedCodes, keys: Tensor, first: int, rows: int, k: int) -> None:
    groups = chunk.maxima.shape[1]
    padded_groups = triton.next_power_of_2(groups)
    padded_k = triton.next_power_of_2(k)
    launch(
        select_topk_kernel,
        (rows,),
        chunk.scratch,
        chunk.maxima,
        out.values,
        out.indices,
        out.counts,
        keys,
        first,
        chunk.d_sae,
        groups,
        k,
        GROUP=chunk.group,
        GROUPS=padded_groups,
        CHOSEN=min(padded_k, padded_groups),
        K=padded_k,
        LOW=16 if chunk.scratch.dtype == torch.bfloat16 else 0,
        BLOCK=min(padded_k, 16),
        **_select_config(k, out.values.device).options,
    )


def _select_config(k: int, device: torch.device) -> Config:
    return config("select_topk" if k <= 128 else "select_topk, large k", device)


def select_topk_traffic(rows: int, d_sae: int, k: int, *, itemsize: int = 2) -> Traffic:
    """Of the selection alone: the maxima and k groups of each row."""
    group = group_for(k)
    selected = rows * (-(-d_sae // group) + k * group) * itemsize
    return Traffic(hbm_read=selected, hbm_written=rows * (k * (itemsize + 4) + 4), l2_read=selected)


def encode_topk_traffic(rows: int, d_in: int, d_sae: int, k: int, *, itemsize: int = 2) -> Traffic:
    """Of :func:`encode_topk`: the products, then the selection."""
    return encode_chunk_traffic(rows, d_in, d_sae, itemsize=itemsize) + select_topk_traffic(
        rows, d_sae, k, itemsize=itemsize
    )
