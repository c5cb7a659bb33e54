"""Activations to e4m3, with one scale for each token and each 128 numbers.

Twin of R1's ``act_quant`` (DeepSeek-V3 technical report, arXiv:2412.19437, 3.3): scale = largest
magnitude / 448. A block of zeros keeps the scale 1, where the published code divides 0 by 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.e4m3 import float32_to_e4m3
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["act_quant", "act_quant_traffic"]

GROUP = 128


@triton.jit
def act_quant_kernel(
    x,
    quantised,
    scales,
    width,
    groups,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    inside = columns < width
    given = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(given), axis=1)
    scale = tl.div_rn(largest, tl.full([GROUPS], 448.0, tl.float32))
    # 0 also where the division underflows: zeros then are all that is left of the block.
    scale = tl.where(scale > 0.0, scale, 1.0)
    # A maximum passes NaN over: what a group with one, or with an infinity, shows is its scale.
    finite = tl.min((tl.abs(given) < float("inf")).to(tl.int32), axis=1) > 0
    scale = tl.where(finite, scale, float("nan"))
    scaled = tl.div_rn(given, tl.broadcast_to(scale[:, None], GROUPS, GROUP_SIZE))
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    tl.store(quantised + row * width + columns, float32_to_e4m3(scaled), mask=inside)
    tl.store(scales + row * groups + group, scale, mask=group < groups)


def act_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises the rows of ``x [tokens, width]`` (float32, bfloat16 or float16). A group with a
    NaN or an infinity has the scale NaN.

    Returns:
        ``(quantised, scales)``: float8_e4m3fn ``[tokens, width]`` and float32
        ``[tokens, ceil(width / 128)]``; x is about quantised * scales.
    """
    tokens, width = x.shape
    groups = triton.cdiv(width, GROUP)
    quantised = x.new_empty(tokens, width, dtype=torch.uint8)
    scales = x.new_empty(tokens, groups, dtype=torch.float32)
    settings = config("act_quant", x.device)
    launch(
        act_quant_kernel,
        (tokens, triton.cdiv(groups, settings.blocks["GROUPS"])),
        x.contiguous(),
        quantised,
        scales,
        width,
        groups,
        GROUP_SIZE=GROUP,
        **settings.options,
    )
    return quantised.view(torch.float8_e4m3fn), scales


def act_quant_traffic(tokens: int, width: int, *, itemsize: int = 2) -> Traffic:
    """Of :func:`act_quant`: everything once in, once out."""
    groups = -(-width // GROUP)
    return Traffic(
        hbm_read=tokens * width * itemsize,
        hbm_written=tokens * (width + 4 * groups),
        l2_read=tokens * width * itemsize,
        flops=3.0 * tokens * width,
    )
