"""Activations in fp8, as DeepSeek-V3 and R1 run: a scale for each token and 128 channels.

s = max|x| / 448 over a group of 128 channels of one token, q = x / s rounded to e4m3. A group of
zeros keeps the scale 1 (R1's published kernel divides 0 by 0 there); a NaN or an infinity makes
its whole group NaN. Source: DeepSeek-V3 technical report, arXiv:2412.19437, 3.3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from r1sae_fast import _core
from r1sae_fast.r1.fp8 import FP8_DTYPE, FP8_MAX, array, in_rust

GROUP_SIZE = 128


def quantize_activations(x: Tensor, group_size: int = GROUP_SIZE) -> tuple[Tensor, Tensor]:
    """Quantises activations [..., channels] of any floating dtype.

    Returns:
        ``(quantised, scales)``: float8_e4m3fn [..., channels] and float32
        [..., ceil(channels / group_size)]; the last group may be smaller.
    """
    groups = _groups(x, group_size)
    scales = groups.abs().amax(-1) / FP8_MAX
    # Zeros, or values so small that the division underflows.
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    # A scale among float32's subnormals is coarse, and the quotient then may pass 448.
    scaled = (groups / scales[..., None]).clamp(-FP8_MAX, FP8_MAX)
    quantised = scaled.flatten(-2)[..., : x.shape[-1]].to(FP8_DTYPE)
    return quantised.contiguous(), scales


def dequantize_activations(
    quantised: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.float32,
    group_size: int = GROUP_SIZE,
) -> Tensor:
    """q * s [..., channels] in ``dtype``, computed in float32."""
    restored = _groups(quantised, group_size) * scales[..., None]
    return restored.flatten(-2)[..., : quantised.shape[-1]].to(dtype)


def fake_quantize_activations(x: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """The activations that a w8a8 product sees: quantised and dequantised, in ``x``'s dtype.

    The gradient is passed through unchanged ("straight through"), rounding having none.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _StraightThrough.apply(x, group_size)
        return result
    return _fake_quantize(x, group_size)


def fake_quantize_activations_reference(x: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """:func:`fake_quantize_activations` in plain torch, which Rust equals to the bit."""
    return dequantize_activations(*quantize_activations(x, group_size), x.dtype, group_size)


def _fake_quantize(x: Tensor, group_size: int) -> Tensor:
    if not in_rust(x, x.dtype):
        return fake_quantize_activations_reference(x, group_size)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    output = torch.empty(rows.shape, dtype=x.dtype)
    _core.fp8_fake_quantize(array(rows), group_size, array(output), torch.get_num_threads())
    return output.view(x.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_size: int) -> Tensor:
        return _fake_quantize(x, group_size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _groups(x: Tensor, group_size: int) -> Tensor:
    """Float32 [..., groups, group_size], the last group filled up with zeros."""
    groups = -(-x.shape[-1] // group_size)
    padded = F.pad(x.float(), (0, groups * group_size - x.shape[-1]))
    return padded.view(*x.shape[:-1], groups, group_size)
