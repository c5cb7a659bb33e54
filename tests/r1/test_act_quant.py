"""Activations in fp8: a loop over groups is the truth, Rust equals torch to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast.ops import set_simd, simd_info
from r1sae_fast.r1.act_quant import (
    dequantize_activations,
    fake_quantize_activations,
    fake_quantize_activations_reference,
    quantize_activations,
)


def loop(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """As R1's published kernel says, but for groups of zeros."""
    rows, channels = x.shape
    codes = torch.zeros(rows, channels).to(torch.float8_e4m3fn)
    scales = torch.ones(rows, -(-channels // group))
    for row in range(rows):
        for number, start in enumerate(range(0, channels, group)):
            part = x[row, start : start + group].float()
            scale = part.abs().max() / 448.0
            if scale != 0:
                scales[row, number] = scale
                scaled = (part / scale).clamp(-448, 448)
                codes[row, start : start + group] = scaled.to(torch.float8_e4m3fn)
    return codes, scales


@pytest.fixture(params=simd_info()[1])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = simd_info()[0]
    set_simd(request.param)
    yield request.param
    set_simd(before)


@pytest.mark.parametrize("shape", [(3, 256), (2, 63), (1, 123), (4, 129), (5, 1), (1, 7168)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_loop_over_groups(
    shape: tuple[int, int], dtype: torch.dtype, level: str
) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    x = (torch.randn(shape, generator=generator) * torch.logspace(-4, 2, shape[1])).to(dtype)
    codes, scales = quantize_activations(x)
    expected, expected_scales = loop(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.float(), expected.float())
    restored = dequantize_activations(codes, scales, dtype)
    assert restored.dtype == dtype
    assert torch.equal(fake_quantize_activations(x), restored)
    assert torch.equal(fake_quantize_activations_reference(x), restored)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    channels=st.integers(1, 400),
    group=st.integers(1, 200),
    exponent=st.integers(-45, 38),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rust_equals_torch(
    rows: int, channels: int, group: int, exponent: int, half: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, channels, generator=generator) * 2 - 1) * 10.0**exponent
    x = x.bfloat16() if half else x
    ours, theirs = (
        fake_quantize_activations(x, group),
        fake_quantize_activations_reference(x, group),
    )
    assert torch.equal(ours, theirs)
    # Three bits of mantissa: half a step is 2^-4 of a number, or 2^-10 scales among subnormals.
    scales = quantize_activations(x, group)[1].repeat_interleave(group, 1)[:, :channels]
    limit = torch.maximum(x.float().abs() * 2**-4, scales * 2**-10) * (1.01 if half else 1.001)
    # What the dtype can't tell apart: half a step between its subnormal numbers.
    info = torch.finfo(x.dtype)
    tiny = info.tiny * info.eps / 2
    assert ((ours.float() - x.float()).abs() <= limit + tiny + 448 * 2.0**-149).all()


def test_a_group_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 300)
    x[0, :100] = 3.0
    codes, scales = quantize_activations(x)
    assert torch.equal(scales[1], torch.ones(3))
    assert torch.equal(dequantize_activations(codes, scales), x)
    assert torch.equal(fake_quantize_activations(x), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_group_and_no_other(bad: float) -> None:
    x = torch.ones(2, 300)
    x[1, 130] = bad
    for result in (fake_quantize_activations(x), fake_quantize_activations_reference(x)):
        assert result[1, 128:256].isnan().all()
        rest = torch.cat((result[0], result[1, :128], result[1, 256:]))
        assert torch.equal(rest, torch.ones_like(rest))


def test_any_leading_shape_and_strides() -> None:
    x = torch.randn(4, 300, 3, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    rows = fake_quantize_activations(x.reshape(12, 300))
    assert torch.equal(fake_quantize_activations(x), rows.view(4, 3, 300))
    assert fake_quantize_activations(x[:0]).shape == (0, 3, 300)
    assert not fake_quantize_activations(x).is_set_to(x)


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.arange(200.0)
    result = fake_quantize_activations(x)
    (result * weight).sum().backward()
    assert torch.equal(result, fake_quantize_activations(x.detach()))
    assert x.grad is not None
    assert torch.equal(x.grad, weight.expand(2, -1))
