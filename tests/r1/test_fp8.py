"""Block fp8 against the obvious loop over blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast.r1.fp8 import FP8_MAX, dequantize_blocks, quantize_blocks, scale_shape


def reference(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    quantised = torch.zeros(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.ones(-(-rows // block), -(-columns // block))
    for i in range(0, rows, block):
        for j in range(0, columns, block):
            part = weight[i : i + block, j : j + block].float()
            scale = part.abs().max() / 448.0
            if scale > 0:
                scales[i // block, j // block] = scale
                quantised[i : i + block, j : j + block] = (part / scale).to(torch.float8_e4m3fn)
    return quantised, scales


@pytest.mark.parametrize(
    "shape", [(1, 1), (128, 128), (576, 256), (129, 127), (63, 123), (300, 1), (1, 400)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_loop_over_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)
    weight *= torch.logspace(-6, 2, shape[1], dtype=torch.float32).to(dtype)
    quantised, scales = quantize_blocks(weight)
    expected, expected_scales = reference(weight)
    assert torch.equal(scales, expected_scales)
    assert scales.dtype == torch.float32
    assert scales.shape == scale_shape(shape)
    assert torch.equal(quantised.view(torch.uint8), expected.view(torch.uint8))
    restored = dequantize_blocks(quantised, scales)
    spread = expected_scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(restored, expected.float() * spread[: shape[0], : shape[1]])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    exponent=st.integers(-44, 37),
    seed=st.integers(0, 2**31),
)
def test_error_is_within_half_a_step_of_e4m3(
    rows: int, columns: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(rows, columns, generator=generator) * 2 - 1) * 10.0**exponent
    quantised, scales = quantize_blocks(weight)
    restored = dequantize_blocks(quantised, scales)
    assert torch.isfinite(restored).all()
    # 3 bits of mantissa: half a step is 2^-4 of a normal number, 2^-10 scales of a subnormal.
    # Scales near float32's own subnormals carry few bits themselves; allow them those.
    limit = torch.maximum(
        weight.abs() * 2**-4 * 1.001, scales.max().expand_as(weight) * 2**-10 * 1.001
    )
    assert ((restored - weight).abs() <= limit + 448 * 2.0**-149).all()


def test_blocks_of_zeros_are_safe() -> None:
    weight = torch.zeros(200, 300)
    weight[:100, :100] = 1.0
    quantised, scales = quantize_blocks(weight)
    assert torch.isfinite(scales).all()
    assert scales[1, 1] == 1.0
    assert torch.equal(dequantize_blocks(quantised, scales), weight)


def test_the_largest_entry_survives() -> None:
    # An entry that divides to just above 448 must not become the e4m3 NaN.
    weight = torch.tensor([[1e-3 * (1 + i * 2**-20)] for i in range(128)])
    quantised, _ = quantize_blocks(weight)
    assert quantised.float().max() == FP8_MAX


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    weight = torch.ones(130, 10)
    weight[129, 3] = bad
    with pytest.raises(ValueError, match="row 129"):
        quantize_blocks(weight)


def test_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="matrices"):
        quantize_blocks(torch.ones(3))
    quantised, _ = quantize_blocks(torch.ones(576, 256))
    with pytest.raises(ValueError, match=r"\(4, 2\).*expected \(5, 2\)"):
        dequantize_blocks(quantised, torch.ones(4, 2))
