"""Certified bounds of float32 pre-activations at the speed of int8 tensor cores.

x and W are rounded to 8 bits stochastically. The errors are then independent, of mean zero and two
values a step apart each, and Hoeffding's inequality bounds their sums: with c = sqrt(ln(4 / delta)
/ 2) and delta = 1e-24 a product, |approximation - exact| <= c (s_x |w| + s_w |s_x q|) fails less
often than memory does. Dimensions with outliers (R1's residual has a few) take no part: they are
added in float32. What the bounds can't exclude, :mod:`r1sae_fast.triton_kernels.int8_encode`
computes exactly.

The CPU's twin, with the proof in full: ``rust/core/src/screen``. It pays where float32 products are
slow beside int8 (H100: 67 TFLOP/s against 1,979), not for bf16 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.encode_gemm import CHUNK, Chunk
from r1sae_fast.triton_kernels.encode_topk import kth_largest
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.sparse_grad import gradient_of_values_traffic
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = [
    "GROUP",
    "ScreenedWeights",
    "bound_chunk",
    "can_bound",
    "int8_screen_traffic",
    "row_bounds",
    "screened_weights",
]

OUTLIERS = 16
CERTAINTY = 5.33
"""c for delta = 1e-24: sqrt(ln(4e24) / 2) = 5.323, rounded up."""
GROUP = 32


@triton.jit
def quantise_rows_kernel(
    numbers, kept, quantised, scales, norms, steps, width, seed, BLOCK: tl.constexpr
):
    """int8 rows, each by its own scale, rounded up or down at random; 0 where ``kept`` is 0."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        keep = tl.load(kept + column, mask=inside, other=0.0)
        value = tl.load(numbers + row * width + column, mask=inside, other=0.0) * keep
        largest = tl.maximum(largest, tl.abs(value))
    most = tl.max(largest, axis=0)
    # So small a row that the scale's reciprocal would overflow rounds to nothing.
    scale = tl.where(most > 1e-30, most / 127.0, 0.0)
    inverse = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
    whole = tl.zeros([BLOCK], tl.int32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        keep = tl.load(kept + column, mask=inside, other=0.0)
        value = tl.load(numbers + row * width + column, mask=inside, other=0.0) * keep
        dither = tl.rand(seed, (row * width + column).to(tl.int32))
        scaled = value * inverse
        squares += scaled * scaled
        rounded = tl.floor(scaled + dither)
        rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int32)
        tl.store(quantised + row * width + column, rounded.to(tl.int8), mask=inside)
        whole += tl.where(inside, rounded * rounded, 0)
    tl.store(scales + row, scale)
    # Squares of scaled numbers neither overflow nor vanish. A row too small for a scale is all
    # error; its length is at most that of its largest number everywhere.
    norm = scale * tl.sqrt(tl.sum(squares, axis=0)) * (1.0 + 1e-6)
    # Squares without a scale are 0, or NaN where a number is: a maximum passes that over.
    longest = most * tl.sqrt(tl.zeros([], tl.float32) + width) + tl.sum(squares, axis=0)
    tl.store(norms + row, tl.where(scale > 0.0, norm, longest))
    tl.store(steps + row, scale * tl.sqrt(tl.sum(whole.to(tl.float32), axis=0)))


@triton.jit
def int8_gemm_kernel(
    x,
    x_scales,
    x_norms,
    x_steps,
    x_outliers,
    x_out_sums,
    weight,
    w_scales,
    w_norms,
    w_outliers,
    w_out_maxima,
    b_enc,
    upper,
    upper_maxima,
    lower_maxima,
    rows,
    d_in,
    d_sae,
    groups,
    certainty,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    OUTLIERS: tl.constexpr,
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
    feature = (n_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_rows, in_features = row < rows, feature < d_sae
    inner = tl.arange(0, BLOCK_K)
    left = x + row[:, None] * d_in + inner[None, :]
    right = weight + feature[None, :] * d_in + inner[:, None]
    whole = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, d_in, BLOCK_K):
        present = inner < d_in - start
        a = tl.load(left, mask=in_rows[:, None] & present[None, :], other=0)
        b = tl.load(right, mask=present[:, None] & in_features[None, :], other=0)
        whole = tl.dot(a, b, whole, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K
    x_scale = tl.load(x_scales + row, mask=in_rows, other=0.0)
    x_step = tl.load(x_steps + row, mask=in_rows, other=0.0)
    w_scale = tl.load(w_scales + feature, mask=in_features, other=0.0)
    w_norm = tl.load(w_norms + feature, mask=in_features, other=0.0)
    approximation = whole.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    margin = certainty * (x_scale[:, None] * w_norm[None, :] + x_step[:, None] * w_scale[None, :])
    for place in range(OUTLIERS):
        x_out = tl.load(x_outliers + row * OUTLIERS + place, mask=in_rows, other=0.0)
        w_out = tl.load(w_outliers + feature * OUTLIERS + place, mask=in_features, other=0.0)
        approximation += x_out[:, None] * w_out[None, :]
    # Float32's own rounding, here and of the exact value: a few units in the last place of all
    # that is added, the outliers' part being at most one side's sum times the other's largest.
    x_out_sum = tl.load(x_out_sums + row, mask=in_rows, other=0.0)
    w_out_max = tl.load(w_out_maxima + feature, mask=in_features, other=0.0)
    size = 2.0 * x_out_sum[:, None] * w_out_max[None, :]
    if HAS_BIAS:
        bias = tl.load(b_enc + feature, mask=in_features, other=0.0)
        approximation += bias[None, :]
        size += 2.0 * tl.abs(bias)[None, :]
    # 1e-37: below that float32 rounds to multiples, not to digits.
    margin += 4e-6 * (size + tl.abs(approximation)) + 1e-37
    # Rows or features that were too small for a scale: their whole product is the error.
    x_norm = tl.load(x_norms + row, mask=in_rows, other=0.0)
    none = (x_scale == 0.0)[:, None] | (w_scale == 0.0)[None, :]
    margin += tl.where(none, x_norm[:, None] * w_norm[None, :], 0.0)

    inside = in_rows[:, None] & in_features[None, :]
    high = tl.where(inside & (approximation + margin > 0.0), approximation + margin, 0.0)
    low = tl.where(inside & (approximation - margin > 0.0), approximation - margin, 0.0)
    tl.store(upper + row[:, None] * d_sae + feature[None, :], high, mask=inside)
    group = n_tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    target = row[:, None] * groups + group[None, :]
    there = in_rows[:, None] & (group < groups)[None, :]
    high_max = tl.max(tl.reshape(high, [BLOCK_M, BLOCK_N // GROUP, GROUP]), axis=2)
    low_max = tl.max(tl.reshape(low, [BLOCK_M, BLOCK_N // GROUP, GROUP]), axis=2)
    tl.store(upper_maxima + target, high_max, mask=there)
    tl.store(lower_maxima + target, low_max, mask=there)


@triton.jit
def row_bound_kernel(maxima, bounds, groups, k, GROUPS: tl.constexpr):
    """Each row's k-th largest of the lower bounds' maxima: at least k values reach it."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    lowest = tl.load(maxima + row * groups + group, mask=group < groups, other=0.0)
    bits = kth_largest(lowest.to(tl.int32, bitcast=True), k, 0)
    tl.store(bounds + row, bits.to(tl.float32, bitcast=True))


@dataclass(frozen=True)
class ScreenedWeights:
    """int8 weights, their scales and lengths; made once, while the weights stay as they are."""

    exact: Tensor
    """float32 ``[d_sae, d_in]``: kept, not copied."""
    b_enc: Tensor | None
    quantised: Tensor
    """int8 ``[d_sae, d_in]``."""
    scales: Tensor
    norms: Tensor


def screened_weights(
    W_features: Tensor, b_enc: Tensor | None = None, seed: int = 0x5EED
) -> ScreenedWeights:
    """Quantises float32 ``W_features [d_sae, d_in]``, the transpose of W_enc.

    Raises:
        ValueError: not float32, or so wide that sums of 8-bit products overflow 32 bits.
    """
    if W_features.dtype != torch.float32:
        raise ValueError(f"W_features is {W_features.dtype}; expected torch.float32")
    if W_features.shape[1] * 127 * 127 >= 2**31:
        raise ValueError(f"d_in is {W_features.shape[1]}; expected at most {2**31 // 127**2}")
    W_features = W_features.contiguous()
    everything = W_features.new_ones(W_features.shape[1])
    quantised, scales, norms, _ = _quantise(W_features, everything, seed)
    return ScreenedWeights(W_features, b_enc, quantised, scales, norms)


def _quantise(numbers: Tensor, kept: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = numbers.shape
    quantised = numbers.new_empty(rows, width, dtype=torch.int8)
    scales, norms, steps = (numbers.new_empty(rows) for _ in range(3))
    launch(
        quantise_rows_kernel,
        (rows,),
        numbers,
        kept,
        quantised,
        scales,
        norms,
        steps,
        width,
        seed,
        **config("quantise_rows", numbers.device).options,
    )
    return quantised, scales, norms, steps


def can_bound(x: Tensor, weights: ScreenedWeights) -> bool:
    """Whether no product can leave float32's range: x and weights hold neither NaN nor infinities,
    nor numbers almost as large. Waits for the GPU."""
    longest = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).amax()
    largest = longest * weights.norms.double().amax()
    if weights.b_enc is not None:
        largest = largest + weights.b_enc.double().abs().amax()
    return bool(largest < 1e36)


def bound_chunk(
    x: Tensor, weights: ScreenedWeights, seed: int, upper: Chunk, lower_maxima: Tensor
) -> None:
    """Bounds the pre-activations of ``x [rows, d_in]`` (see :func:`can_bound`; at most as many rows
    as ``upper``).

    ``upper`` gets the upper bounds, or 0 where they are below, with their groups' maxima;
    ``lower_maxima [rows, groups]`` the largest lower bound of each group, or 0.
    """
    rows = x.shape[0]
    d_in, d_sae = x.shape[1], weights.exact.shape[0]
    count = min(OUTLIERS, d_in)
    outliers = x.abs().amax(0).topk(count).indices
    kept = x.new_ones(d_in).index_fill_(0, outliers, 0.0)
    quantised, scales, norms, steps = _quantise(x, kept, seed)
    pad = (0, OUTLIERS - count)
    x_outliers = torch.nn.functional.pad(x[:, outliers], pad).contiguous()
    w_outliers = torch.nn.functional.pad(weights.exact[:, outliers], pad).contiguous()
    settings = config("int8_gemm", x.device)
    blocks = settings.blocks
    grid = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(d_sae, blocks["BLOCK_N"])
    launch(
        int8_gemm_kernel,
        (grid,),
        quantised,
        scales,
        norms,
        steps,
        x_outliers,
        x_outliers.abs().sum(1),
        weights.quantised,
        weights.scales,
        weights.norms,
        w_outliers,
        w_outliers.abs().amax(1),
        x if weights.b_enc is None else weights.b_enc,
        upper.scratch,
        upper.maxima,
        lower_maxima,
        rows,
        d_in,
        d_sae,
        lower_maxima.shape[1],
        CERTAINTY,
        HAS_BIAS=weights.b_enc is not None,
        GROUP=GROUP,
        OUTLIERS=OUTLIERS,
        GROUP_M=8,
        **settings.options,
    )


def row_bounds(lower_maxima: Tensor, k: int) -> Tensor:
    """Each row's k-th largest of ``lower_maxima [rows, groups]``, float32 ``[rows]``; 0 where there
    are fewer than k. k pre-activations of the row are at least as large."""
    rows, groups = lower_maxima.shape
    bounds = lower_maxima.new_empty(rows)
    launch(
        row_bound_kernel,
        (rows,),
        lower_maxima,
        bounds,
        groups,
        k,
        GROUPS=triton.next_power_of_2(groups),
        **config("row_bound", lower_maxima.device).options,
    )
    return bounds


def int8_screen_traffic(
    rows: int, d_in: int, d_sae: int, k: int, *, candidates: float | None = None
) -> tuple[Traffic, Traffic]:
    """Of :func:`r1sae_fast.triton_kernels.int8_encode.int8_topk`: bounds and candidates (its FLOPs
    are int8 operations), and their exact products. ``candidates`` a row: default 4 k, as for random
    unit columns, the worst measured (2.9 k, and the first k once more)."""
    candidates = min(4.0 * k if candidates is None else candidates, d_sae)
    chunks = -(-rows // CHUNK)
    quantise = rows * d_in * (4 + 4 + 1)
    upper = rows * d_sae * 4 * (1 + 2 / 32)
    screen = Traffic(
        hbm_read=quantise + chunks * d_sae * d_in + rows * (2 * d_sae / 32 * 4 + candidates * 128),
        hbm_written=rows * d_in + upper,
        l2_read=rows * d_in * d_sae * (1 / 128 + 1 / 128),
        flops=2.0 * rows * d_in * d_sae,
        scratch=min(rows, CHUNK) * d_sae * 4 * (1 + 2 / 32),
    )
    per_chunk = gradient_of_values_traffic(
        min(rows, CHUNK), int(candidates), d_sae, d_in, itemsize=4
    )
    rescore = Traffic(
        chunks * per_chunk.hbm_read,
        chunks * per_chunk.hbm_written,
        chunks * per_chunk.l2_read,
        chunks * per_chunk.flops,
        per_chunk.scratch,
    )
    return screen, rescore
