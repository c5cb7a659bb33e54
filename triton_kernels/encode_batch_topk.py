"""The k * rows largest pre-activations of a whole batch, exactly, without dense codes.

Chunk by chunk: the k * rows-th largest among what is kept so far and the chunk's group maxima (all
of them pre-activations of the batch) bounds the final cut from below; what reaches it is collected,
and what falls below the cut of all collected is dropped again. So no more than k * rows candidates
(and ties) outlive a chunk. Twin of :func:`r1sae_fast.ops.batch_topk`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.triton_kernels.collect import collect
from r1sae_fast.triton_kernels.encode_gemm import (
    CHUNK,
    chunk_buffers,
    encode_chunk,
    encode_chunk_traffic,
)
from r1sae_fast.triton_kernels.kth_value import kth_value, kth_value_traffic
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["by_row_and_value", "encode_batch_topk", "encode_batch_topk_traffic", "largest"]

Codes = tuple[Tensor, Tensor, Tensor]


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    check_finite: bool = False,
) -> tuple[Codes, Tensor]:
    """The ``k * rows`` largest positive values of ``relu(x @ W_enc + b_enc)``, ties to the lower
    row, then to the lower feature.

    Arguments as for :func:`r1sae_fast.triton_kernels.encode_topk.encode_topk`, any k.

    Returns:
        ``((values [nnz], indices int32 [nnz], row_offsets int64 [rows + 1]), bad_row)``, each row
        by falling value. Waits for the GPU: how many codes there are depends on the numbers.
    """
    rows, d_sae = x.shape[0], W_enc.shape[1]
    if not 0 <= k <= d_sae:
        raise ValueError(f"k is {k}; expected 0 to {d_sae}")
    x = x.contiguous()
    wanted = k * rows
    chunk = chunk_buffers(x, rows, d_sae)
    values = x.new_zeros(0)
    indices, owners = (x.new_zeros(0, dtype=dtype) for dtype in (torch.int32, torch.int64))
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        encode_chunk(x, W_enc, b_enc, chunk, first, count, check_finite=check_finite)
        if not wanted:
            continue
        known = torch.cat([values, chunk.maxima[:count].flatten()])
        found = collect(chunk, count, kth_value(known, wanted), strict=False)
        rows_found = torch.arange(first, first + count, device=x.device)
        rows_found = rows_found.repeat_interleave(found[2], output_size=found[0].shape[0])
        values = torch.cat([values, found[0]])
        indices = torch.cat([indices, found[1]])
        owners = torch.cat([owners, rows_found])
        if values.shape[0] > wanted:
            kept = largest(values, wanted)
            values, indices, owners = values[kept], indices[kept], owners[kept]
    return by_row_and_value(values, indices, owners, rows), chunk.bad_row


def largest(values: Tensor, wanted: int) -> Tensor:
    """Which are the ``wanted`` largest, ties to the first."""
    least = kth_value(values, wanted)
    numbers = values.float()
    above = numbers > least
    tied = numbers == least
    room = wanted - above.sum()
    return above | (tied & (tied.cumsum(0) <= room))


def by_row_and_value(values: Tensor, indices: Tensor, owners: Tensor, rows: int) -> Codes:
    """Codes in order of rows and features to CSR, each row by falling value, ties to the lower
    feature; two stable sorts."""
    order = values.argsort(descending=True, stable=True)
    order = order[owners[order].argsort(stable=True)]
    ends = torch.arange(rows + 1, device=values.device)
    offsets = torch.searchsorted(owners[order], ends)
    return values[order], indices[order], offsets


def encode_batch_topk_traffic(
    rows: int, d_in: int, d_sae: int, k: int, *, itemsize: int = 2
) -> Traffic:
    """Of :func:`encode_batch_topk` where codes are spread evenly over chunks: the products, the
    maxima four times, the groups that hold codes twice, and sorting."""
    nnz = rows * k
    maxima = rows * -(-d_sae // 32) * itemsize
    collecting = Traffic(
        hbm_read=2 * (maxima + nnz * 32 * itemsize),
        hbm_written=nnz * (itemsize + 4),
        l2_read=2 * (maxima + nnz * 32 * itemsize),
    )
    sorting = Traffic(hbm_read=16.0 * nnz * 8, hbm_written=16.0 * nnz * 8)
    chunks = -(-rows // CHUNK)
    bound = kth_value_traffic(rows * -(-d_sae // 32) + chunks * nnz, itemsize=itemsize)
    return encode_chunk_traffic(rows, d_in, d_sae, itemsize=itemsize) + bound + collecting + sorting
