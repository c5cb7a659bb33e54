"""act_quant and the block-scaled products against torch, to the bit where they can be."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings

from r1sae_fast.r1 import fp8_operations
from r1sae_fast.r1.fp8 import dequantize_blocks, quantize_blocks
from r1sae_fast.r1.fp8_linear import ReferenceKernels, fp8_kernels
from r1sae_fast.triton_kernels import block_fp8_gemm as gemm
from r1sae_fast.triton_kernels.act_quant import act_quant, act_quant_traffic
from r1sae_fast.triton_kernels.block_fp8_gemm import (
    block_fp8_gemm,
    block_fp8_gemm_traffic,
    grouped_block_fp8_gemm,
)
from r1sae_fast.triton_kernels.e4m3 import e4m3_to_float16, e4m3_to_float32, float32_to_e4m3
from r1sae_fast.triton_kernels.fp8_kernels import TritonFp8Kernels

QUICK = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FP8 = torch.float8_e4m3fn


@triton.jit
def widen_kernel(source, half, full, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    bits = tl.load(source + place)
    tl.store(half + place, e4m3_to_float16(bits))
    tl.store(full + place, e4m3_to_float32(bits))


@triton.jit
def narrow_kernel(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, float32_to_e4m3(tl.load(source + place)))


def test_every_byte_widens_exactly(device: torch.device) -> None:
    source = torch.arange(256, dtype=torch.uint8, device=device)
    half = torch.empty(256, dtype=torch.float16, device=device)
    full = torch.empty(256, device=device)
    widen_kernel[(1,)](source, half, full, SIZE=256)
    expected = source.view(FP8).float()
    real = ~expected.isnan()
    assert torch.equal(full[real], expected[real])
    assert torch.equal(half[real].float(), expected[real])


def test_every_float_narrows_as_torch_does(device: torch.device) -> None:
    """All boundaries between two e4m3 numbers, the floats beside them, and random ones."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    beside = [middle.nextafter(torch.tensor(0.0)), middle, middle.nextafter(torch.tensor(500.0))]
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(1000, generator=generator) * torch.logspace(-8, 2, 1000)
    every = torch.cat([numbers, *beside, spread.clamp(-448, 448)])
    every = torch.cat([every, -every])
    every = torch.nn.functional.pad(every, (0, 4096 - every.shape[0])).to(device)
    found = torch.empty(4096, dtype=torch.uint8, device=device)
    narrow_kernel[(1,)](every, found, SIZE=4096)
    assert torch.equal(found, every.to(FP8).view(torch.uint8))


def act_quant_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R1's, in plain torch."""
    tokens, width = x.shape
    groups = -(-width // 128)
    padded = torch.nn.functional.pad(x.float(), (0, groups * 128 - width)).view(tokens, groups, 128)
    scale = padded.abs().amax(-1) / 448
    scale = torch.where(scale > 0, scale, 1.0)
    quantised = (padded / scale[..., None]).clamp(-448, 448).to(FP8)
    return quantised.flatten(1)[:, :width].contiguous(), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@QUICK
@given(
    tokens=st.integers(0, 4),
    width=st.sampled_from([1, 63, 128, 129, 384, 500]),
    seed=st.integers(0, 2**31),
)
def test_act_quant_is_torchs_to_the_bit(
    dtype: torch.dtype, tokens: int, width: int, seed: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, width, generator=generator) * 10).to(dtype)
    if tokens > 1:
        x[0] = 0
        x[1, : width // 2] = 1e-30 if dtype != torch.float16 else 1e-7
    found, scales = (part.cpu() for part in act_quant(x.to(device)))
    expected, expected_scales = act_quant_reference(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def operands(
    tokens: int, n: int, k: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator)
    return (
        *act_quant_reference(x),
        *quantize_blocks(torch.randn(n, k, generator=generator)),
    )


def truth(
    a: torch.Tensor, a_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and how large the terms are."""
    spread = a_scales.repeat_interleave(128, 1)[:, : a.shape[1]].double()
    wide = a.double() * spread
    own = weight.float().double()
    blocks = weight_scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    own = own * blocks[: own.shape[0], : own.shape[1]]
    return wide @ own.T, wide.abs() @ own.abs().T


def within(found: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, k: int) -> bool:
    rounding = torch.finfo(found.dtype).eps / 2 + (k + 4) * torch.finfo(torch.float32).eps / 2
    return bool(((found.double() - exact).abs() <= rounding * size).all())


@pytest.mark.parametrize("half", [False, True], ids=["e4m3", "as-float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@QUICK
@given(
    tokens=st.sampled_from([0, 1, 5, 20]),
    n=st.sampled_from([1, 63, 128, 192]),
    k=st.sampled_from([1, 63, 128, 320]),
    seed=st.integers(0, 2**31),
)
def test_product(
    half: bool,
    dtype: torch.dtype,
    tokens: int,
    n: int,
    k: int,
    seed: int,
    device: torch.device,
) -> None:
    given_operands = operands(tokens, n, k, seed)
    with pytest.MonkeyPatch.context() as patch:
        if half:
            patch.setattr(gemm, "NATIVE", ())
        found = block_fp8_gemm(*(t.to(device) for t in given_operands), dtype).cpu()
    assert (found.dtype, found.shape) == (dtype, (tokens, n))
    assert within(found, *truth(*given_operands), k)


def test_it_is_what_dequantising_gives(device: torch.device) -> None:
    a, a_scales, weight, weight_scales = operands(7, 200, 256, 0)
    a_scales.fill_(1.0)
    found = block_fp8_gemm(*(t.to(device) for t in (a, a_scales, weight, weight_scales)),
                           torch.float32)  # fmt: skip
    plain = a.float() @ dequantize_blocks(weight, weight_scales).T
    torch.testing.assert_close(found.cpu(), plain, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("counts", [[3, 0, 20, 1], [0, 0, 0, 0], [0, 40, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("with_slots", [False, True], ids=["in-order", "gathered"])
def test_groups(counts: list[int], with_slots: bool, device: torch.device) -> None:
    n, k, rows = 192, 200, sum(counts)
    tokens = 9 if with_slots else rows
    generator = torch.Generator().manual_seed(1)
    a, a_scales = act_quant_reference(torch.randn(tokens, k, generator=generator))
    pairs = [quantize_blocks(torch.randn(n, k, generator=generator)) for _ in counts]
    weight, scales = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    slots = torch.randint(tokens, (rows,), generator=generator) if with_slots else None
    moved = [t.to(device) for t in (a, a_scales, weight.view(FP8), scales, offsets)]
    found = grouped_block_fp8_gemm(
        *moved, None if slots is None else slots.to(device), torch.float32
    ).cpu()
    assert found.shape == (rows, n)
    places = torch.arange(rows) if slots is None else slots
    for expert, (first, last) in enumerate(pairwise(offsets.tolist())):
        own = places[first:last]
        exact = truth(a[own], a_scales[own], weight[expert].view(FP8), scales[expert])
        assert within(found[first:last], *exact, k)


@pytest.mark.parametrize("block_size", [(128, 128), (64, 32)])
def test_the_engines_kernels_are_the_formulas(
    block_size: tuple[int, int], device: torch.device
) -> None:
    """What R1's layers call, against the plain torch formulas, experts that lie apart included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 200, generator=generator).to(device)
    weight, scale_inv = quantize_blocks(torch.randn(192, 200, generator=generator), block_size)
    weight, scale_inv = weight.to(device), scale_inv.to(device)
    ours, formulas = TritonFp8Kernels(), ReferenceKernels()
    values, scales = ours.quantize_activations(x, block_size[1])
    expected = formulas.quantize_activations(x, block_size[1])
    assert torch.equal(values.float(), expected[0].float())
    assert torch.equal(scales, expected[1])
    given = (values, scales, weight, scale_inv, block_size, torch.float32)
    torch.testing.assert_close(ours.linear(*given), formulas.linear(*given), rtol=1e-5, atol=1e-4)

    stacked, grid = weight.expand(3, -1, -1).clone(), scale_inv.expand(3, -1, -1).clone()
    half = stacked[:, :128], grid[:, : 128 // block_size[0]]  # as a gate beside its up projection
    counts = torch.tensor([4, 0, 6], device=device)
    flat = (values.view(10, 200), scales.view(10, -1))
    groups = (*flat, *half, counts, block_size, torch.float32)
    torch.testing.assert_close(
        ours.grouped_linear(*groups), formulas.grouped_linear(*groups), rtol=1e-5, atol=1e-4
    )


def test_gpus_take_them_as_operations() -> None:
    assert isinstance(fp8_kernels(torch.device("cuda")), fp8_operations.OperationKernels)
    assert fp8_kernels(torch.device("cpu")) is None
    assert isinstance(fp8_operations._kernels(), TritonFp8Kernels)


def test_the_operations_cuda_functions_are_the_formulas(device: torch.device) -> None:
    values, scales, weight, weight_scales = (t.to(device) for t in operands(6, 130, 200, 3))
    formulas, cuda = ReferenceKernels(), fp8_operations.KERNELS
    x = values.float()
    for mine, theirs in zip(
        cuda["fp8_act_quant"](x, 128), formulas.quantize_activations(x, 128), strict=True
    ):
        assert torch.equal(mine.float(), theirs.float())
    product = (values, scales, weight, weight_scales)
    torch.testing.assert_close(
        cuda["fp8_linear"](*product, [128, 128], torch.float32),
        formulas.linear(*product, (128, 128), torch.float32),
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


@pytest.mark.usefixtures("guarded", "grid_order")
def test_writes_all_of_its_output_and_nothing_else(device: torch.device) -> None:
    a, a_scales, weight, weight_scales = (t.to(device) for t in operands(20, 192, 200, 3))
    quantised, scales = act_quant(a.float())
    assert not scales.isnan().any()
    assert not quantised.float().isnan().any()
    assert not block_fp8_gemm(a, a_scales, weight, weight_scales).isnan().any()
    offsets = torch.tensor([0, 0, 13, 20], device=device)
    three = (weight.expand(3, -1, -1), weight_scales.expand(3, -1, -1).contiguous())
    assert not grouped_block_fp8_gemm(a, a_scales, *three, offsets).isnan().any()


def test_traffic() -> None:
    quant = act_quant_traffic(4096, 7168)
    assert quant.hbm < 4096 * 7168 * 3.05
    linear = block_fp8_gemm_traffic(4096, 7168, 7168)
    assert linear.hbm < 1.02 * (4096 * 7168 + 7168 * 7168 + 2 * 4096 * 7168)
    experts = block_fp8_gemm_traffic(8 * 32, 4096, 7168, experts=256)
    assert experts.hbm < 1.02 * 256 * 4096 * 7168  # a step of generation: the weights, once


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_makes_its_group_nan(bad: float, device: torch.device) -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(device)
    good, _ = act_quant(x)
    x[1, 130] = bad
    values, scales = act_quant(x)
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(scales.isnan().cpu(), expected)
    assert torch.equal(values[0].view(torch.uint8), good[0].view(torch.uint8))
    weight, inverse = quantize_blocks(torch.ones(128, 300, device=device))
    output = block_fp8_gemm(values, scales, weight, inverse, torch.float32)
    assert torch.equal(output.isnan().any(1).cpu(), expected.any(1))


def test_no_rows_at_all(device: torch.device) -> None:
    """As of experts that no token chose."""
    kernels = TritonFp8Kernels()
    x = torch.zeros(0, 256, device=device)
    values, scales = kernels.quantize_activations(x, 128)
    assert (tuple(values.shape), tuple(scales.shape)) == ((0, 256), (0, 2))
    weight, inverse = quantize_blocks(torch.ones(128, 256, device=device))
    output = kernels.linear(values, scales, weight, inverse, (128, 128), torch.bfloat16)
    assert tuple(output.shape) == (0, 128)
