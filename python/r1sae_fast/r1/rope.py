"""Rotary positions with YaRN, as DeepSeek-V3 uses them on the decoupled part of each head.

Pairs are interleaved (dimensions 2i and 2i+1 turn together), and the attention's scale
carries YaRN's temperature. Source: DeepSeek-V3 technical report, arXiv:2412.19437, and
YaRN, arXiv:2309.00071.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from r1sae_fast.r1.config import R1Config


@lru_cache(maxsize=8)
def inverse_frequencies(config: R1Config) -> Tensor:
    """Angular speed of each pair, float32 [qk_rope_head_dim / 2].

    Under YaRN the slow pairs (fewer than ``beta_slow`` turns in the original context) are
    slowed by ``factor``, the fast ones (more than ``beta_fast`` turns) are kept, and a linear
    ramp over the pair's index lies between. Kept between calls: do not write into it.
    """
    dim = config.qk_rope_head_dim
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    plain = 1.0 / config.rope_theta**pair
    scaling = config.rope_scaling
    if scaling is None:
        return plain

    def pair_with_turns(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    index = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((index - low) / width).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_scale(config: R1Config) -> float:
    """Factor on query-key products: 1/sqrt(head width) times YaRN's squared temperature."""
    scale = 1.0 / math.sqrt(config.qk_head_dim)
    scaling = config.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rotary_table(config: R1Config, positions: Tensor) -> Tensor:
    """Cosine and sine of every pair's angle at int ``positions`` of any shape: float32
    [..., rope_dim / 2, 2]."""
    frequencies = inverse_frequencies(config).to(positions.device)
    angles = positions.to(torch.float32)[..., None] * frequencies
    table = torch.stack((angles.cos(), angles.sin()), -1)
    if (scaling := config.rope_scaling) is not None:
        table *= _mscale(scaling.factor, scaling.mscale) / _mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return table


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the interleaved pairs of ``x`` [..., rope_dim] by a table that broadcasts to them.

    Computed in float32, returned in x's dtype.
    """
    pairs = x.float().contiguous().view(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # torch.compile has no complex numbers
        (even, odd), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1)
    else:  # the same as a complex product, several times faster
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


def rotate_(x: Tensor, table: Tensor) -> Tensor:
    """:func:`rotate` into ``x`` itself, which may be a slice of a wider tensor; for inference."""
    if x.dtype == torch.float32:
        pairs = x.view(*x.shape[:-1], -1, 2)
        torch.view_as_complex(pairs).mul_(torch.view_as_complex(table))
        return x
    return x.copy_(rotate(x, table))
