"""The w8a8 products as operations: shapes without data, and no silent loss of gradients."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from r1sae_fast.r1.fp8 import quantize_blocks
from r1sae_fast.r1.fp8_linear import ReferenceKernels, block_fp8_linear
from r1sae_fast.r1.fp8_operations import KERNELS, OperationKernels

BLOCK = (128, 128)


def operands() -> tuple[torch.Tensor, ...]:
    """x [6, 200], weight [3, 150, 200] and its scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 200, generator=generator)
    weights = [torch.randn(150, 200, generator=generator) for _ in range(3)]
    parts = [quantize_blocks(weight) for weight in weights]
    return x, torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def test_opcheck() -> None:
    x, weight, grid = operands()
    own = torch.ops.r1sae_fast
    # The other two of torch's checks compute with fp8 tensors, which torch can't.
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(own.fp8_act_quant.default, (x, 128), test_utils=checks)
    values, scales = OperationKernels().quantize_activations(x, 128)
    size, dtype = list(BLOCK), torch.bfloat16
    one = (values, scales, weight[0], grid[0], size, dtype)
    torch.library.opcheck(own.fp8_linear.default, one, test_utils=checks)
    counts = torch.tensor([2, 0, 4])
    many = (values, scales, weight, grid, counts, size, dtype)
    torch.library.opcheck(own.fp8_grouped_linear.default, many, test_utils=checks)


def test_they_are_the_formulas() -> None:
    x, weight, grid = operands()
    mine, formulas = OperationKernels(), ReferenceKernels()
    quantised = mine.quantize_activations(x, 128)
    for found, expected in zip(quantised, formulas.quantize_activations(x, 128), strict=True):
        assert torch.equal(found.float(), expected.float())
    counts = torch.tensor([2, 0, 4])
    for name, given in (
        ("linear", (weight[0], grid[0])),
        ("grouped_linear", (weight, grid, counts)),
    ):
        arguments = (*quantised, *given, BLOCK, torch.float32)
        assert torch.equal(getattr(mine, name)(*arguments), getattr(formulas, name)(*arguments))


def test_cuda_takes_kernels_and_says_so_without_data() -> None:
    pytest.importorskip("triton")
    for name in KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"r1sae_fast::{name}", "CUDA")
    with FakeTensorMode():
        x = torch.empty(2, 5, 7168, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(576, 7168, device="cuda", dtype=torch.float8_e4m3fn)
        found = block_fp8_linear(x, weight, torch.empty(5, 56, device="cuda"))
    assert (tuple(found.shape), found.dtype) == ((2, 5, 576), torch.bfloat16)


def test_no_gradient_is_lost_in_silence() -> None:
    x, weight, grid = operands()
    kernels = OperationKernels()
    values, scales = kernels.quantize_activations(x.requires_grad_(), 128)
    product = kernels.linear(values, scales, weight[0], grid[0], BLOCK, torch.float32)
    with pytest.raises(NotImplementedError, match='load R1 with fp8="dequantize"'):
        product.sum().backward()
