"""Everything in a chunk of pre-activations that reaches a bound, in order of rows and features.

Two passes, counting and writing, so that places are known and no atomics are needed: the same
input gives the same output. Groups whose maximum misses the bound are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.encode_gemm import Chunk
from r1sae_fast.triton_kernels.launch import launch

__all__ = ["collect", "group_bounds_of"]


@triton.jit
def collect_kernel(
    scratch,
    maxima,
    bounds,
    group_bounds,
    counts,
    offsets,
    values,
    indices,
    d_sae,
    groups,
    PER_FEATURE: tl.constexpr,
    PER_ROW: tl.constexpr,
    STRICT: tl.constexpr,
    WRITE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    bound = 0.0
    if PER_ROW:
        bound = tl.load(bounds + row)
    elif not PER_FEATURE:
        bound = tl.load(bounds)
    start = tl.full([], 0, tl.int64)
    if WRITE:
        start = tl.load(offsets + row)
    found = tl.full([], 0, tl.int32)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        highest = tl.load(maxima + row * groups + group, mask=group < groups, other=0.0)
        highest = highest.to(tl.float32)
        least = tl.zeros([BLOCK], tl.float32) + bound
        if PER_FEATURE:
            least = tl.load(group_bounds + group, mask=group < groups, other=0.0)
        hopeful = (highest > 0.0) & (highest >= least)
        if tl.max(hopeful.to(tl.int32), axis=0) > 0:
            column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            inside = hopeful[:, None] & (column < d_sae)
            pre = tl.load(scratch + row * d_sae + column, mask=inside, other=0.0).to(tl.float32)
            own = tl.zeros([BLOCK, GROUP], tl.float32) + bound
            if PER_FEATURE:
                own = tl.load(bounds + column, mask=inside, other=0.0)
            kept = inside & (pre > 0.0)
            if STRICT:
                kept = kept & (pre > own)
            else:
                kept = kept & (pre >= own)
            flat = tl.reshape(kept.to(tl.int32), [BLOCK * GROUP])
            if WRITE:
                place = start + found + tl.cumsum(flat, axis=0) - 1
                chosen = flat > 0
                value = tl.reshape(pre, [BLOCK * GROUP])
                tl.store(values + place, value.to(values.dtype.element_ty), mask=chosen)
                tl.store(indices + place, tl.reshape(column, [BLOCK * GROUP]), mask=chosen)
            found += tl.sum(flat, axis=0)
    if not WRITE:
        tl.store(counts + row, found)


def group_bounds_of(threshold: Tensor, d_sae: int, group: int) -> tuple[Tensor, Tensor | None]:
    """``threshold [1]`` or ``[d_sae]`` in float32, and each group's least; None for one threshold.

    NaN, which nothing exceeds, becomes infinity.
    """
    bounds = threshold.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if bounds.shape[0] == 1 and d_sae > 1:
        return bounds, None
    padded = torch.nn.functional.pad(bounds.expand(d_sae), (0, -d_sae % group), value=torch.inf)
    return bounds.contiguous(), padded.view(-1, group).amin(1)


def collect(
    chunk: Chunk,
    rows: int,
    bounds: Tensor,
    group_bounds: Tensor | None = None,
    *,
    strict: bool,
    per_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches the bounds (``strict``: exceeds them) in the first ``rows`` rows of a chunk.

    Args:
        chunk: filled by :func:`r1sae_fast.triton_kernels.encode_gemm.encode_chunk`.
        rows: how many of its rows hold something.
        bounds: float32 ``[1]``, ``[rows]`` with ``per_row``, or ``[d_sae]`` with
            ``group_bounds``, each group's least.
        strict: what equals its bound is left out.

    Returns:
        ``(values [n], indices int32 [n], counts int32 [rows])`` by row, then by feature; only
        positive values. Waits for the GPU once, to learn n.
    """
    counts = chunk.scratch.new_empty(rows, dtype=torch.int32)
    offsets = counts.new_zeros(rows + 1, dtype=torch.int64)
    _pass(chunk, rows, bounds, group_bounds, counts, offsets, None, None, strict, per_row)
    torch.cumsum(counts, 0, out=offsets[1:])
    total = int(offsets[-1])
    values = chunk.scratch.new_empty(total)
    indices = chunk.scratch.new_empty(total, dtype=torch.int32)
    if total:
        _pass(chunk, rows, bounds, group_bounds, counts, offsets, values, indices, strict, per_row)
    return values, indices, counts


def _pass(
    chunk: Chunk,
    rows: int,
    bounds: Tensor,
    group_bounds: Tensor | None,
    counts: Tensor,
    offsets: Tensor,
    values: Tensor | None,
    indices: Tensor | None,
    strict: bool,
    per_row: bool,
) -> None:
    launch(
        collect_kernel,
        (rows,),
        chunk.scratch,
        chunk.maxima,
        bounds,
        bounds if group_bounds is None else group_bounds,
        counts,
        offsets,
        chunk.scratch if values is None else values,
        counts if indices is None else indices,
        chunk.d_sae,
        chunk.maxima.shape[1],
        PER_FEATURE=group_bounds is not None,
        PER_ROW=per_row,
        STRICT=strict,
        WRITE=values is not None,
        GROUP=chunk.group,
        **config("collect", chunk.scratch.device).options,
    )
