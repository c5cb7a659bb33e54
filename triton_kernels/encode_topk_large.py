"""Row top-k for any k: beyond 512 a row's candidates no longer fit a program's registers.

The k-th largest of each row is found by radix, four passes of eight bits over the chunk's scratch;
what reaches it is collected in order. The auxiliary loss asks for so many (half of d_in).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.collect import collect
from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.encode_batch_topk import Codes, by_row_and_value
from r1sae_fast.triton_kernels.encode_gemm import (
    CHUNK,
    Chunk,
    chunk_buffers,
    encode_chunk,
    encode_chunk_traffic,
)
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["encode_topk_large", "encode_topk_large_traffic", "row_kth_values"]


@triton.jit
def row_kth_kernel(scratch, bounds, d_sae, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.int32)
    wanted = tl.zeros([], tl.int32) + k
    for step in range(0, 4):
        shift = 24 - 8 * step
        total = tl.zeros([256], tl.int32)
        for first in range(0, d_sae, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < d_sae
            number = tl.load(scratch + row * d_sae + place, mask=inside, other=0.0)
            bits = number.to(tl.float32).to(tl.int32, bitcast=True)
            # Two shifts: one by 32 would be undefined.
            shares = inside & (((bits >> shift) >> 8) == ((prefix >> shift) >> 8))
            total += tl.histogram((bits >> shift) & 0xFF, 256, mask=shares)
        above = tl.sum(total, axis=0) - tl.cumsum(total, axis=0)
        # There are k numbers at least, so one byte qualifies.
        chosen = tl.max(tl.where(above + total >= wanted, byte, 0), axis=0)
        wanted -= tl.sum(tl.where(byte == chosen, above, 0), axis=0)
        prefix = prefix | (chosen << shift)
    tl.store(bounds + row, prefix.to(tl.float32, bitcast=True))


def row_kth_values(chunk: Chunk, rows: int, k: int) -> Tensor:
    """The k-th largest (k from 1 to d_sae) of each of a chunk's first ``rows`` rows, float32
    ``[rows]``; 0 where fewer are positive."""
    bounds = chunk.scratch.new_empty(rows, dtype=torch.float32)
    launch(
        row_kth_kernel,
        (rows,),
        chunk.scratch,
        bounds,
        chunk.d_sae,
        k,
        **config("row_kth", chunk.scratch.device).options,
    )
    return bounds


def encode_topk_large(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *, check_finite: bool = False
) -> tuple[Codes, Tensor]:
    """As :func:`r1sae_fast.triton_kernels.encode_topk.encode_topk` for k from 0 to d_sae, as CSR.

    Returns:
        ``((values, indices, row_offsets), bad_row)``. Waits for the GPU once a chunk.
    """
    rows, d_sae = x.shape[0], W_enc.shape[1]
    if not 0 <= k <= d_sae:
        raise ValueError(f"k is {k}; expected 0 to {d_sae}")
    x = x.contiguous()
    chunk = chunk_buffers(x, rows, d_sae)
    values, indices, owners = [x.new_zeros(0)], [x.new_zeros(0, dtype=torch.int32)], []
    owners.append(x.new_zeros(0, dtype=torch.int64))
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        encode_chunk(x, W_enc, b_enc, chunk, first, count, check_finite=check_finite)
        if not k:
            continue
        bounds = row_kth_values(chunk, count, k)
        found = collect(chunk, count, bounds, strict=False, per_row=True)
        own = torch.arange(first, first + count, device=x.device)
        values.append(found[0])
        indices.append(found[1])
        owners.append(own.repeat_interleave(found[2], output_size=found[0].shape[0]))
    whole = torch.cat(owners)
    ordered, features, offsets = by_row_and_value(
        torch.cat(values), torch.cat(indices), whole, rows
    )
    # Ties with the k-th beyond k: the last of their rows.
    whole = torch.arange(rows, device=x.device).repeat_interleave(
        offsets.diff(), output_size=ordered.shape[0]
    )
    kept = torch.arange(ordered.shape[0], device=x.device) - offsets[whole] < k
    ends = torch.cat([offsets.new_zeros(1), offsets.diff().clamp_max(k).cumsum(0)])
    return (ordered[kept], features[kept], ends), chunk.bad_row


def encode_topk_large_traffic(
    rows: int, d_in: int, d_sae: int, k: int, *, itemsize: int = 2
) -> Traffic:
    """Of :func:`encode_topk_large` where all groups hold codes: the products, six reads of the
    scratch, and sorting."""
    scratch, nnz = rows * d_sae * itemsize, rows * k
    selecting = Traffic(
        hbm_read=6.0 * scratch + 16.0 * nnz * 8,
        hbm_written=nnz * (itemsize + 4) + 16.0 * nnz * 8,
        l2_read=6.0 * scratch,
    )
    return encode_chunk_traffic(rows, d_in, d_sae, itemsize=itemsize) + selecting
