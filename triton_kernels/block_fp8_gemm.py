"""Products of e4m3 activations and block-scaled e4m3 weights, as R1's linear layers need them.

Every 128 numbers of the inner dimension have scales of their own (a token's and a 128 x 128 block's
of the weight), so each K-block's product is added up on the tensor cores and then promoted: scaled
and added in float32. That is also what keeps the tensor cores' narrow fp8 accumulators harmless
(arXiv:2412.19437, 3.3.2). Architectures without e4m3 tensor cores (sm_80; gfx942 has another e4m3)
multiply the same numbers as float16, in which they are exact.

The grouped form is for a mixture of experts: tokens sorted by expert, ragged groups, empty experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import Config, config
from r1sae_fast.triton_kernels.e4m3 import e4m3_to_float16
from r1sae_fast.triton_kernels.launch import current_target, launch
from r1sae_fast.triton_kernels.targets import INTERPRETER
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["block_fp8_gemm", "block_fp8_gemm_traffic", "grouped_block_fp8_gemm"]

BLOCK = 128
NATIVE = ("sm_90", "sm_100", INTERPRETER)
"""Targets whose tensor cores multiply e4m3 as NVIDIA defines it."""


@triton.jit
def _product(
    a,
    a_scales,
    weight,
    weight_scales,
    rows,
    in_rows,
    features,
    in_features,
    k,
    k_blocks,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N], whose columns share a row of blocks of the weight."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    inner = tl.arange(0, STEP)
    left = a + rows[:, None] * k + inner[None, :]
    right = weight + features[None, :] * k + inner[:, None]
    for step in range(0, tl.cdiv(k, STEP)):
        present = inner < k - step * STEP
        left_mask = in_rows[:, None] & present[None, :]
        right_mask = in_features[None, :] & present[:, None]
        if HALF:
            x = e4m3_to_float16(tl.load(left, mask=left_mask, other=0))
            w = e4m3_to_float16(tl.load(right, mask=right_mask, other=0))
        else:
            x = tl.load(left, mask=left_mask, other=0.0)
            w = tl.load(right, mask=right_mask, other=0.0)
        block = step * STEP // BLOCK_K
        x_scale = tl.load(a_scales + rows * k_blocks + block, mask=in_rows, other=0.0)
        w_scale = tl.load(weight_scales + block)
        total += tl.dot(x, w) * (x_scale * w_scale)[:, None]
        left += STEP
        right += STEP
    return total


@triton.jit
def block_fp8_gemm_kernel(
    a,
    a_scales,
    weight,
    weight_scales,
    output,
    tokens,
    n,
    k,
    k_blocks,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # GROUP_M tiles of rows share the weight's tiles in the L2 cache.
    program = tl.program_id(0)
    n_tiles = tl.cdiv(n, BLOCK_N)
    m_tiles = tl.cdiv(tokens, BLOCK_M)
    group = program // (GROUP_M * n_tiles)
    height = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    m_tile = group * GROUP_M + (program % (GROUP_M * n_tiles)) % height
    n_tile = (program % (GROUP_M * n_tiles)) // height

    rows = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    features = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_features = rows < tokens, features < n
    wide_rows, wide_features = rows.to(tl.int64), features.to(tl.int64)
    total = _product(
        a,
        a_scales,
        weight,
        weight_scales + (n_tile * BLOCK_N // BLOCK_K) * k_blocks,
        wide_rows,
        in_rows,
        wide_features,
        in_features,
        k,
        k_blocks,
        HALF,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        STEP,
    )
    tl.store(
        output + wide_rows[:, None] * n + wide_features[None, :],
        total.to(output.dtype.element_ty),
        mask=in_rows[:, None] & in_features[None, :],
    )


@triton.jit
def grouped_block_fp8_gemm_kernel(
    a,
    a_scales,
    weight,
    weight_scales,
    slots,
    offsets,
    output,
    experts,
    n,
    k,
    k_blocks,
    weight_stride,
    scale_stride,
    HAS_SLOTS: tl.constexpr,
    HALF: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):
    # Tiles of rows are counted expert by expert; which one this is, each program finds itself, so
    # the host need not know the groups' sizes.
    expert_range = tl.arange(0, EXPERTS)
    known = expert_range < experts
    begins = tl.load(offsets + expert_range, mask=known, other=0)
    ends = tl.load(offsets + expert_range + 1, mask=known, other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, axis=0)
    program = tl.program_id(1)
    if program < tl.max(tile_ends, axis=0):
        expert = tl.sum((known & (tile_ends <= program)).to(tl.int32), axis=0)
        mine = expert_range == expert
        first_tile = tl.sum(tl.where(mine, tile_ends - tiles, 0), axis=0)
        first = tl.sum(tl.where(mine, begins, 0), axis=0)
        last = tl.sum(tl.where(mine, ends, 0), axis=0)

        places = first + (program - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = places < last
        rows = places
        if HAS_SLOTS:
            rows = tl.load(slots + places, mask=in_rows, other=0).to(tl.int64)
        n_tile = tl.program_id(0)
        features = (n_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_features = features < n
        wide = expert.to(tl.int64)
        total = _product(
            a,
            a_scales,
            weight + wide * weight_stride,
            weight_scales + wide * scale_stride + (n_tile * BLOCK_N // BLOCK_K) * k_blocks,
            rows,
            in_rows,
            features,
            in_features,
            k,
            k_blocks,
            HALF,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STEP,
        )
        tl.store(
            output + places[:, None] * n + features[None, :],
            total.to(output.dtype.element_ty),
            mask=in_rows[:, None] & in_features[None, :],
        )


def block_fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``(a * a_scales) @ (weight * weight_scales).T``, added up in float32.

    Args:
        a: float8_e4m3fn ``[tokens, k]``, as :func:`act_quant` gives it.
        a_scales: float32 ``[tokens, ceil(k / 128)]``.
        weight: float8_e4m3fn ``[n, k]``.
        weight_scales: float32 ``[ceil(n / 128), ceil(k / 128)]``.
        dtype: of the result ``[tokens, n]``.
    """
    a, weight = a.contiguous(), weight.contiguous()
    tokens, k = a.shape
    n = weight.shape[0]
    output = a_scales.new_empty(tokens, n, dtype=dtype)
    settings = _settings(tokens, a.device)
    half = current_target(a.device) not in NATIVE
    blocks = settings.blocks
    grid = triton.cdiv(tokens, blocks["BLOCK_M"]) * triton.cdiv(n, blocks["BLOCK_N"])
    launch(
        block_fp8_gemm_kernel,
        (grid,),
        _bytes(a, half),
        a_scales,
        _bytes(weight, half),
        weight_scales,
        output,
        tokens,
        n,
        k,
        weight_scales.shape[1],
        HALF=half,
        BLOCK_K=BLOCK,
        GROUP_M=8,
        **settings.options,
    )
    return output


def grouped_block_fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    slots: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """:func:`block_fp8_gemm` of each group of rows with its own weight.

    Args:
        a: float8_e4m3fn ``[tokens, k]``.
        a_scales: float32 ``[tokens, ceil(k / 128)]``.
        weight: float8_e4m3fn ``[experts, n, k]``; each expert's contiguous, they may lie apart.
        weight_scales: float32 ``[experts, ceil(n / 128), ceil(k / 128)]``, likewise.
        offsets: int64 ``[experts + 1]``: rows ``offsets[e]`` to ``offsets[e + 1]`` of the output
            are expert e's; groups may be empty.
        slots: int64 ``[rows of the output]``, the row of ``a`` for each; default, the same row.
        dtype: of the result.

    Returns:
        ``[len(slots) or tokens, n]``. Nothing waits for the GPU: the grid has room for the most
        tiles that the groups can need, and what is left over ends at once.
    """
    a = a.contiguous()
    k = a.shape[1]
    experts, n, _ = weight.shape
    weight, weight_scales = _each_contiguous(weight), _each_contiguous(weight_scales)
    rows = a.shape[0] if slots is None else slots.shape[0]
    output = a_scales.new_empty(rows, n, dtype=dtype)
    settings = _settings(-(-rows // max(experts, 1)), a.device)
    half = current_target(a.device) not in NATIVE
    blocks = settings.blocks
    # Each group's last tile may be part empty: at most one more a group (or a row).
    most_tiles = rows // blocks["BLOCK_M"] + min(experts, rows)
    launch(
        grouped_block_fp8_gemm_kernel,
        (triton.cdiv(n, blocks["BLOCK_N"]), most_tiles),
        _bytes(a, half),
        a_scales,
        _bytes(weight, half),
        weight_scales,
        offsets if slots is None else slots,
        offsets,
        output,
        experts,
        n,
        k,
        weight_scales.shape[2],
        weight.stride(0),
        weight_scales.stride(0),
        HAS_SLOTS=slots is not None,
        HALF=half,
        EXPERTS=triton.next_power_of_2(experts),
        BLOCK_K=BLOCK,
        **settings.options,
    )
    return output


def _settings(rows: int, device: torch.device) -> Config:
    return config("block_fp8_gemm" if rows > 64 else "block_fp8_gemm, few rows", device)


def _each_contiguous(tensor: Tensor) -> Tensor:
    """Copied only where one expert's own part is not contiguous."""
    _, rows, columns = tensor.stride()
    own = columns == 1 and (rows == tensor.shape[2] or tensor.shape[1] == 1)
    return tensor if own else tensor.contiguous()


def _bytes(tensor: Tensor, half: bool) -> Tensor:
    return tensor.view(torch.uint8) if half else tensor


def block_fp8_gemm_traffic(
    tokens: int, n: int, k: int, *, experts: int = 1, itemsize: int = 2
) -> Traffic:
    """Of either form; each of ``experts`` weights in use read once, ``tokens`` rows in all."""
    k_blocks = -(-k // BLOCK)
    weights = experts * (n * k + -(-n // BLOCK) * k_blocks * 4)
    return Traffic(
        hbm_read=tokens * (k + 4 * k_blocks) + weights,
        hbm_written=tokens * n * itemsize,
        l2_read=tokens * k * -(-n // BLOCK) + weights * -(-tokens // (BLOCK * experts)),
        flops=2.0 * tokens * n * k,
    )
