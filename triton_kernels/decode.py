"""Sparse codes times ``W_dec``: a gather-sum, one tile of columns at a time.

Twin of :mod:`r1sae_fast.ops.decode`. All rows pass over one tile of columns before the next tile
begins, so a tile of ``W_dec`` comes from global memory once and from the L2 cache after that.
Sums are kept in float32 and in a fixed order: the same codes give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.e4m3 import e4m3_to_float32
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["decode", "decode_error", "decode_traffic"]


@triton.jit
def decode_kernel(
    values,
    indices,
    row_offsets,
    W_dec,
    scales,
    b_dec,
    x,
    output,
    error,
    squared_error,
    d_in,
    tiles,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X: tl.constexpr,
    WRITE_OUTPUT: tl.constexpr,
    WRITE_ERROR: tl.constexpr,
    WRITE_SQUARED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs of the first axis run first: all rows on one tile of columns.
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d_in
    first = tl.load(row_offsets + row)
    last = tl.load(row_offsets + row + 1)

    # BLOCK_K features side by side, added up once at the end: no exchange between warps till then.
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        present = codes < last
        features = tl.load(indices + codes, mask=present, other=0).to(tl.int64)
        strengths = tl.load(values + codes, mask=present, other=0.0).to(tl.float32)
        weights = tl.load(
            W_dec + features[:, None] * d_in + columns[None, :],
            mask=present[:, None] & inside[None, :],
            other=0,
        )
        if HAS_SCALES:
            strengths *= tl.load(scales + features, mask=present, other=0.0)
            total += strengths[:, None] * e4m3_to_float32(weights)
        else:
            total += strengths[:, None] * weights.to(tl.float32)
    reconstruction = tl.sum(total, axis=0)
    if HAS_BIAS:
        reconstruction += tl.load(b_dec + columns, mask=inside, other=0.0).to(tl.float32)

    place = row * d_in + columns
    rounded = reconstruction.to(output.dtype.element_ty)
    if WRITE_OUTPUT:
        tl.store(output + place, rounded, mask=inside)
    if HAS_X:
        # Of the reconstruction as rounded, which is what the caller sees.
        given = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, given - rounded.to(tl.float32), 0.0)
        if WRITE_ERROR:
            tl.store(error + place, difference.to(error.dtype.element_ty), mask=inside)
        if WRITE_SQUARED:
            tl.store(squared_error + row * tiles + tile, tl.sum(difference * difference, axis=0))


def decode(
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    scales: Tensor | None = None,
) -> Tensor:
    """``codes @ W_dec + b_dec`` in the dtype of ``values``, summed in float32.

    Args:
        values: float32, bfloat16 or float16 ``[nnz]``.
        indices: int32 ``[nnz]``, each below ``d_sae``: not checked here.
        row_offsets: int64 ``[rows + 1]``.
        W_dec: ``[d_sae, d_in]``, contiguous; of the dtype of ``values``, or ``float8_e4m3fn``
            with ``scales``.
        b_dec: ``[d_in]``.
        scales: float32 ``[d_sae]``, of the features of an fp8 ``W_dec``.

    Returns:
        ``[rows, d_in]``.
    """
    output = values.new_empty(row_offsets.shape[0] - 1, W_dec.shape[1])
    _run(values, indices, row_offsets, W_dec, b_dec, scales, None, output, None, None)
    return output


def decode_error(
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    W_dec: Tensor,
    x: Tensor,
    b_dec: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    write_output: bool = True,
    write_error: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Reconstruction, ``x`` minus it, and each row's squared error, in one pass.

    Arguments as for :func:`decode`, and ``x [rows, d_in]`` in the dtype of ``values``.

    Returns:
        ``(reconstruction, error, squared_error)``: the first two ``[rows, d_in]`` or None where
        not asked for; the last float32 ``[rows]``, its sum the numerator of FVU.
    """
    rows, d_in = row_offsets.shape[0] - 1, W_dec.shape[1]
    output = values.new_empty(rows, d_in) if write_output else None
    error = values.new_empty(rows, d_in) if write_error else None
    tiles = triton.cdiv(d_in, config("decode", values.device).blocks["BLOCK_D"])
    squared = values.new_empty(rows, tiles, dtype=torch.float32)
    _run(values, indices, row_offsets, W_dec, b_dec, scales, x, output, error, squared)
    return output, error, squared.sum(1)


def _run(
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scales: Tensor | None,
    x: Tensor | None,
    output: Tensor | None,
    error: Tensor | None,
    squared: Tensor | None,
) -> None:
    rows, d_in = row_offsets.shape[0] - 1, W_dec.shape[1]
    settings = config("decode", values.device)
    tiles = triton.cdiv(d_in, settings.blocks["BLOCK_D"])
    launch(
        decode_kernel,
        (rows, tiles),
        values,
        indices,
        row_offsets,
        W_dec if scales is None else W_dec.view(torch.uint8),
        values if scales is None else scales,
        values if b_dec is None else b_dec,
        values if x is None else x,
        values if output is None else output,
        values if error is None else error,
        values if squared is None else squared,
        d_in,
        tiles,
        HAS_SCALES=scales is not None,
        HAS_BIAS=b_dec is not None,
        HAS_X=x is not None,
        WRITE_OUTPUT=output is not None,
        WRITE_ERROR=error is not None,
        WRITE_SQUARED=squared is not None,
        **settings.options,
    )


def decode_traffic(
    rows: int, k: int, d_sae: int, d_in: int, *, value_bytes: int = 2, weight_bytes: int = 2
) -> Traffic:
    """Of :func:`decode` with k codes a row, every feature in use at some row or other.

    Each needed row segment of ``W_dec`` is read once a tile from global memory, and once a code
    from the cache.
    """
    needed = min(d_sae, rows * k)
    codes = rows * k * (value_bytes + 4) + (rows + 1) * 8
    return Traffic(
        hbm_read=needed * d_in * weight_bytes + codes + d_in * value_bytes,
        hbm_written=rows * d_in * value_bytes,
        l2_read=rows * k * d_in * weight_bytes,
        flops=2.0 * rows * k * d_in,
    )
