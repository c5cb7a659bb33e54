"""Gradients of sparse encoding and decoding: inner products, and sums over each feature's codes.

Twins of the gradients in :mod:`r1sae_fast.ops.decode`. Weight gradients are added up feature by
feature, in order of rows: no atomics, so the same codes give the same bits. Like decoding, all
programs pass over one tile of columns before the next begins, so that what is read again and again
stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = [
    "FeatureMajor",
    "feature_major",
    "gradient_of_values",
    "gradient_of_values_traffic",
    "gradient_of_weight",
    "gradient_of_weight_traffic",
]


@triton.jit
def gradient_of_values_kernel(
    gradient,
    indices,
    row_offsets,
    weight,
    partial,
    d_in,
    nnz,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d_in
    upstream = tl.load(gradient + row * d_in + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(row_offsets + row)
    last = tl.load(row_offsets + row + 1)
    for start in range(first, last, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        present = codes < last
        features = tl.load(indices + codes, mask=present, other=0).to(tl.int64)
        weights = tl.load(
            weight + features[:, None] * d_in + columns[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if WIDE:
            products = tl.sum(upstream[None, :].to(tl.float64) * weights.to(tl.float64), axis=1)
        else:
            products = tl.sum(upstream[None, :] * weights, axis=1)
        tl.store(partial + tile * nnz + codes, products, mask=present)


@triton.jit
def gradient_of_weight_kernel(
    gradient,
    values,
    order,
    code_rows,
    feature_offsets,
    features,
    output,
    sums,
    d_in,
    HAS_FEATURES: tl.constexpr,
    WRITE_SUMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d_in
    feature = place
    if HAS_FEATURES:
        feature = tl.load(features + place).to(tl.int64)
    first = tl.load(feature_offsets + feature)
    last = tl.load(feature_offsets + feature + 1)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    strength = tl.zeros([BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        present = places < last
        codes = tl.load(order + places, mask=present, other=0)
        rows = tl.load(code_rows + places, mask=present, other=0).to(tl.int64)
        strengths = tl.load(values + codes, mask=present, other=0.0).to(tl.float32)
        upstream = tl.load(
            gradient + rows[:, None] * d_in + columns[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        total += strengths[:, None] * upstream.to(tl.float32)
        strength += strengths
    tl.store(
        output + place * d_in + columns,
        tl.sum(total, axis=0).to(output.dtype.element_ty),
        mask=inside,
    )
    if WRITE_SUMS:
        if tile == 0:  # the outer one is the compiler's
            tl.store(sums + place, tl.sum(strength, axis=0).to(sums.dtype.element_ty))


class FeatureMajor:
    """Where each feature's codes are: the transpose of a code matrix, without its values.

    Attributes:
        order: int64 ``[nnz]``, code numbers by feature, then by row.
        rows: int32 ``[nnz]``, their rows.
        offsets: int64 ``[d_sae + 1]``, where each feature's codes begin.
    """

    def __init__(self, order: Tensor, rows: Tensor, offsets: Tensor) -> None:
        self.order, self.rows, self.offsets = order, rows, offsets

    @property
    def d_sae(self) -> int:
        """How many features there are."""
        return self.offsets.shape[0] - 1


def feature_major(indices: Tensor, row_offsets: Tensor, d_sae: int) -> FeatureMajor:
    """Sorts codes by feature with torch's stable sort; nothing waits for the GPU.

    Args:
        indices: int32 ``[nnz]``.
        row_offsets: int64 ``[rows + 1]``.
        d_sae: number of features.
    """
    ordered, order = torch.sort(indices, stable=True)
    ends = torch.arange(d_sae + 1, device=indices.device, dtype=torch.int32)
    offsets = torch.searchsorted(ordered, ends, right=False)
    rows = torch.searchsorted(row_offsets, order, right=True, out_int32=True) - 1
    return FeatureMajor(order, rows, offsets)


def gradient_of_values(
    gradient: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    weight: Tensor,
    *,
    wide: bool = False,
) -> Tensor:
    """``gradient[row of code] . weight[feature of code]`` for each code, summed in float32.

    Args:
        gradient: ``[rows, d_in]``.
        indices: int32 ``[nnz]``.
        row_offsets: int64 ``[rows + 1]``.
        weight: ``[d_sae, d_in]``, contiguous.
        wide: multiply and add in float64 instead: the exact value, rounded once.

    Returns:
        ``[nnz]`` in the dtype of ``gradient``.
    """
    rows, d_in = gradient.shape
    nnz = indices.shape[0]
    settings = config("gradient_of_values", gradient.device)
    tiles = triton.cdiv(d_in, settings.blocks["BLOCK_D"])
    # A sum of its own a tile, so that a tile of the weights is read from memory once.
    partial = gradient.new_empty(tiles, nnz, dtype=torch.float64 if wide else torch.float32)
    launch(
        gradient_of_values_kernel,
        (rows if nnz else 0, tiles),
        gradient.contiguous(),
        indices,
        row_offsets,
        weight,
        partial,
        d_in,
        nnz,
        WIDE=wide,
        **settings.options,
    )
    return partial.sum(0).to(gradient.dtype)


def gradient_of_weight(
    gradient: Tensor,
    values: Tensor,
    by_feature: FeatureMajor,
    *,
    features: Tensor | None = None,
    with_sums: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """For each feature, the sum of ``value * gradient[row]`` over its codes.

    With the reconstruction's gradient and the codes' values that is the gradient of ``W_dec``; with
    ``x`` and the gradients of the pre-activations, that of ``W_enc``, and ``sums`` that of
    ``b_enc``. The auxiliary loss calls it on dead features alone.

    Args:
        gradient: ``[rows, d_in]``.
        values: ``[nnz]``, in the order of the codes.
        by_feature: of the same codes.
        features: int32 or int64 ``[n]``, which to write; default all, zeros where nothing fired.
        with_sums: also sum the values of each feature.
        dtype: of the results; default that of ``gradient``.

    Returns:
        ``([n or d_sae, d_in], [n or d_sae] or None)``.
    """
    d_in = gradient.shape[1]
    count = by_feature.d_sae if features is None else features.shape[0]
    wanted = gradient.dtype if dtype is None else dtype
    output = gradient.new_empty(count, d_in, dtype=wanted)
    sums = gradient.new_empty(count, dtype=wanted) if with_sums else None
    settings = config("gradient_of_weight", gradient.device)
    launch(
        gradient_of_weight_kernel,
        (count, triton.cdiv(d_in, settings.blocks["BLOCK_D"])),
        gradient.contiguous(),
        values,
        by_feature.order,
        by_feature.rows,
        by_feature.offsets,
        by_feature.offsets if features is None else features,
        output,
        output if sums is None else sums,
        d_in,
        HAS_FEATURES=features is not None,
        WRITE_SUMS=sums is not None,
        **settings.options,
    )
    return output, sums


def gradient_of_values_traffic(
    rows: int, k: int, d_sae: int, d_in: int, *, itemsize: int = 2, tile: int = 512
) -> Traffic:
    """Of :func:`gradient_of_values`: weights and gradient once, the tiles' sums out and in."""
    needed = min(d_sae, rows * k)
    tiles = -(-d_in // tile)
    partial = tiles * rows * k * 4
    codes = tiles * (rows * k * 4 + (rows + 1) * 8)
    return Traffic(
        hbm_read=(needed + rows) * d_in * itemsize + codes + partial,
        hbm_written=partial + rows * k * itemsize,
        l2_read=rows * k * d_in * itemsize,
        flops=2.0 * rows * k * d_in,
        scratch=partial,
    )


def gradient_of_weight_traffic(
    rows: int,
    k: int,
    d_sae: int,
    d_in: int,
    *,
    itemsize: int = 2,
    output_itemsize: int = 4,
    tile: int = 256,
) -> Traffic:
    """Of :func:`gradient_of_weight` for all features: the gradient once, the weights' once out."""
    tiles = -(-d_in // tile)
    codes = tiles * (rows * k * (8 + 4 + itemsize) + (d_sae + 1) * 8)
    return Traffic(
        hbm_read=rows * d_in * itemsize + codes,
        hbm_written=d_sae * d_in * output_itemsize,
        l2_read=rows * k * d_in * itemsize,
        flops=2.0 * rows * k * d_in,
    )
