"""``x @ W_enc + b_enc`` and relu for a chunk of rows, with the maxima that selection starts from.

The pre-activations of at most :data:`CHUNK` rows are in global memory at once, written once and
read where something can be chosen; there is never a dense [rows, d_sae].

Rounding is the release's: the product is added up in float32 and rounded to the dtype, then
``b_enc`` is added and the sum rounded again. float32 products are IEEE float32, never tf32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["CHUNK", "Chunk", "chunk_buffers", "encode_chunk", "encode_chunk_traffic"]

CHUNK = 1024
"""Rows whose pre-activations are held at once: 117 MB at 28,672 features in float32."""


@triton.jit
def encode_gemm_kernel(
    x,
    W_enc,
    b_enc,
    scratch,
    maxima,
    bad_row,
    first_row,
    rows,
    d_in,
    d_sae,
    groups,
    W_stride_in,
    W_stride_sae,
    HAS_BIAS: tl.constexpr,
    CHECK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # GROUP_M tiles of rows share a tile of W_enc in the L2 cache.
    program = tl.program_id(0)
    n_tiles = tl.cdiv(d_sae, BLOCK_N)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    band = program // (GROUP_M * n_tiles)
    height = tl.minimum(m_tiles - band * GROUP_M, GROUP_M)
    m_tile = band * GROUP_M + (program % (GROUP_M * n_tiles)) % height
    n_tile = (program % (GROUP_M * n_tiles)) // height

    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_features = row < rows, feature < d_sae
    wide_row, wide_feature = row.to(tl.int64), feature.to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    left = x + (first_row + wide_row)[:, None] * d_in + inner[None, :]
    right = W_enc + wide_feature[None, :] * W_stride_sae + inner[:, None] * W_stride_in
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        present = inner < d_in - start
        a = tl.load(left, mask=in_rows[:, None] & present[None, :], other=0.0)
        b = tl.load(right, mask=present[:, None] & in_features[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K * W_stride_in
    dtype = scratch.dtype.element_ty
    if HAS_BIAS:
        bias = tl.load(b_enc + feature, mask=in_features, other=0.0).to(tl.float32)
        total = total.to(dtype).to(tl.float32) + bias[None, :]
    pre = total.to(dtype).to(tl.float32)
    if CHECK:
        # A sum with a NaN or an infinity is one, and what is not finite is no 0 when taken from
        # itself. Columns beyond the last are 0 or the product of nothing.
        together = tl.sum(pre, axis=1)
        bad = (together - together) != 0.0
        tl.atomic_min(bad_row + tl.zeros([BLOCK_M], tl.int32), first_row + row, mask=bad & in_rows)
    # NaN becomes 0: what is no number is no code.
    pre = tl.where(pre > 0.0, pre, 0.0)
    tl.store(
        scratch + wide_row[:, None] * d_sae + wide_feature[None, :],
        pre.to(dtype),
        mask=in_rows[:, None] & in_features[None, :],
    )
    # Columns beyond the last hold 0: no weight, no bias.
    highest = tl.max(tl.reshape(pre, [BLOCK_M, BLOCK_N // GROUP, GROUP]), axis=2)
    group = n_tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    tl.store(
        maxima + wide_row[:, None] * groups + group[None, :],
        highest.to(dtype),
        mask=in_rows[:, None] & (group < groups)[None, :],
    )


@dataclass(frozen=True)
class Chunk:
    """Global memory for the pre-activations of one chunk of rows; reused for the next."""

    scratch: Tensor
    """``[rows, d_sae]``: relu of the pre-activations."""
    maxima: Tensor
    """``[rows, groups]``: the largest of each ``group`` features next to each other."""
    bad_row: Tensor
    """int32 ``[1]``: the first row that holds a NaN or an infinity, or more than there are."""
    group: int

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.scratch.shape[1]


def chunk_buffers(
    x: Tensor, rows: int, d_sae: int, group: int = 32, dtype: torch.dtype | None = None
) -> Chunk:
    """Makes a :class:`Chunk` for up to ``rows`` rows (at most :data:`CHUNK`)."""
    rows = min(rows, CHUNK)
    dtype = x.dtype if dtype is None else dtype
    return Chunk(
        x.new_empty(rows, d_sae, dtype=dtype),
        x.new_empty(rows, triton.cdiv(d_sae, group), dtype=dtype),
        x.new_full((1,), torch.iinfo(torch.int32).max, dtype=torch.int32),
        group,
    )


def encode_chunk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    chunk: Chunk,
    first_row: int,
    rows: int,
    *,
    check_finite: bool = False,
) -> None:
    """Fills ``chunk`` with rows ``first_row`` to ``first_row + rows`` of ``x [n, d_in]``.

    ``W_enc [d_in, d_sae]`` may be strided either way: stored by features, as FastSAE does, or by
    inputs, as released. ``check_finite`` lowers ``chunk.bad_row``; nothing waits for it.
    """
    d_in, d_sae = W_enc.shape
    kind = "float32" if x.dtype == torch.float32 else "half"
    if (d_in * x.element_size()) % 16 or max(W_enc.stride()) % 16:
        kind = "ragged"
    settings = config(f"encode_gemm, {kind}", x.device)
    blocks = settings.blocks
    grid = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(d_sae, blocks["BLOCK_N"])
    launch(
        encode_gemm_kernel,
        (grid,),
        x,
        W_enc,
        x if b_enc is None else b_enc,
        chunk.scratch,
        chunk.maxima,
        chunk.bad_row,
        first_row,
        rows,
        d_in,
        d_sae,
        chunk.maxima.shape[1],
        W_enc.stride(0),
        W_enc.stride(1),
        HAS_BIAS=b_enc is not None,
        CHECK=check_finite,
        GROUP=chunk.group,
        GROUP_M=8,
        **settings.options,
    )


def encode_chunk_traffic(rows: int, d_in: int, d_sae: int, *, itemsize: int = 2) -> Traffic:
    """Of all chunks of ``rows`` rows: W_enc once a chunk, the scratch once out."""
    chunks = -(-rows // CHUNK)
    scratch = min(rows, CHUNK) * d_sae * itemsize
    return Traffic(
        hbm_read=(rows * d_in + chunks * d_in * d_sae) * itemsize,
        hbm_written=rows * d_sae * itemsize * (1 + 1 / 32),
        l2_read=rows * d_in * d_sae * itemsize * (1 / 128 + 1 / 256),
        flops=2.0 * rows * d_in * d_sae,
        scratch=scratch * (1 + 1 / 32),
    )
