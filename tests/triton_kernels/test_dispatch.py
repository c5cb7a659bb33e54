"""The operations take the kernels on a GPU; here their CUDA functions are called as they are."""

from __future__ import annotations

import pytest
import torch

from r1sae_fast import SparseCodes, ops
from r1sae_fast.ops import _cuda

from .conftest import ON_GPU
from .test_decode import problem


@pytest.mark.parametrize(
    "name", ["decode", "decode_gradient_of_values", "decode_gradient_of_weight"]
)
def test_the_kernels_are_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"r1sae_fast::{name}", "CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_they_are_the_cpus_to_rounding(dtype: torch.dtype) -> None:
    """float64 has no kernel: it takes the reference."""
    (values, indices, offsets), W_dec, b_dec, gradient = problem(4, 40, 63, dtype, 2)
    own = torch.ops.r1sae_fast
    tolerance = 8 * torch.finfo(dtype).eps
    for found, expected in (
        (
            _cuda.decode(values, indices, offsets, W_dec, b_dec),
            own.decode(values, indices, offsets, W_dec, b_dec),
        ),
        (
            _cuda.gradient_of_values(gradient, indices, offsets, W_dec),
            own.decode_gradient_of_values(gradient, indices, offsets, W_dec),
        ),
        (
            _cuda.gradient_of_weight(gradient, values, indices, offsets, 40),
            own.decode_gradient_of_weight(gradient, values, indices, offsets, 40),
        ),
    ):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_on_a_gpu() -> None:
    (values, indices, offsets), W_dec, b_dec, _ = problem(64, 1024, 512, torch.float32, 2)
    codes = SparseCodes(values.cuda().requires_grad_(), indices.cuda(), offsets.cuda(), 1024)
    weight, bias = W_dec.cuda().requires_grad_(), b_dec.cuda().requires_grad_()
    ops.decode(codes, weight, bias).square().sum().backward()
    own = SparseCodes(values.clone().requires_grad_(), indices, offsets, 1024)
    cpu_weight, cpu_bias = W_dec.clone().requires_grad_(), b_dec.clone().requires_grad_()
    ops.decode(own, cpu_weight, cpu_bias).square().sum().backward()
    for found, expected in (
        (codes.values.grad, own.values.grad),
        (weight.grad, cpu_weight.grad),
        (bias.grad, cpu_bias.grad),
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)
