"""Pre-activations beyond a threshold (JumpReLU), straight to CSR, without dense codes.

Twin of :func:`r1sae_fast.ops.threshold`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.triton_kernels.collect import collect, group_bounds_of
from r1sae_fast.triton_kernels.encode_batch_topk import Codes, by_row_and_value
from r1sae_fast.triton_kernels.encode_gemm import (
    CHUNK,
    chunk_buffers,
    encode_chunk,
    encode_chunk_traffic,
)
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["encode_threshold", "encode_threshold_traffic"]


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    *,
    check_finite: bool = False,
) -> tuple[Codes, Tensor]:
    """The positive values of ``x @ W_enc + b_enc`` that exceed ``threshold``, float32 ``[1]`` or
    ``[d_sae]``.

    Other arguments and results as for
    :func:`r1sae_fast.triton_kernels.encode_batch_topk.encode_batch_topk`.
    """
    rows, d_sae = x.shape[0], W_enc.shape[1]
    x = x.contiguous()
    chunk = chunk_buffers(x, rows, d_sae)
    bounds, group_bounds = group_bounds_of(threshold, d_sae, chunk.group)
    values, indices, owners = [], [], []
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        encode_chunk(x, W_enc, b_enc, chunk, first, count, check_finite=check_finite)
        found = collect(chunk, count, bounds, group_bounds, strict=True)
        rows_found = torch.arange(first, first + count, device=x.device)
        owners.append(rows_found.repeat_interleave(found[2], output_size=found[0].shape[0]))
        values.append(found[0])
        indices.append(found[1])
    if not values:
        empty = x.new_zeros(0)
        none = x.new_zeros(0, dtype=torch.int32)
        return (empty, none, x.new_zeros(1, dtype=torch.int64)), chunk.bad_row
    codes = (torch.cat(values), torch.cat(indices), torch.cat(owners))
    return by_row_and_value(*codes, rows), chunk.bad_row


def encode_threshold_traffic(
    rows: int, d_in: int, d_sae: int, l0: float, *, itemsize: int = 2
) -> Traffic:
    """Of :func:`encode_threshold` with ``l0`` codes a row."""
    nnz = rows * l0
    read = 2 * (rows * -(-d_sae // 32) * itemsize + nnz * 32 * itemsize)
    collecting = Traffic(hbm_read=read, hbm_written=nnz * (itemsize + 4), l2_read=read)
    sorting = Traffic(hbm_read=16.0 * nnz * 8, hbm_written=16.0 * nnz * 8)
    return encode_chunk_traffic(rows, d_in, d_sae, itemsize=itemsize) + collecting + sorting
