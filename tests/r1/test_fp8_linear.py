"""w8a8 products: the published formula block by block, the fast path, and the kernels' slot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1sae_fast.r1.act_quant import quantize_activations
from r1sae_fast.r1.cache import LatentCache
from r1sae_fast.r1.checkpoint import load_model
from r1sae_fast.r1.engines.local import LocalEngine
from r1sae_fast.r1.fp8 import dequantize_blocks, quantize_blocks
from r1sae_fast.r1.fp8_experts import Fp8Experts
from r1sae_fast.r1.fp8_linear import (
    Fp8Linear,
    ReferenceKernels,
    block_fp8_linear,
    block_fp8_linear_reference,
    fp8_kernels,
    prepare,
    register_fp8_kernels,
)
from r1sae_fast.r1.model import R1Model

# tokens, outputs, channels: whole and ragged blocks, R1's kv_a_proj_with_mqa
SHAPES = [(4, 256, 384), (3, 63, 123), (1, 129, 257), (2, 576, 7168), (0, 5, 130)]


def case(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens, outputs, channels = shape
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(tokens, channels, generator=generator)
    x = x * torch.logspace(-1, 1, channels)  # so that groups have scales of their own
    weight = torch.randn(outputs, channels, generator=generator) * channels**-0.5
    return x.to(dtype), *quantize_blocks(weight)


def error(found: Tensor, expected: Tensor, median: bool = False) -> float:
    """Largest (or median) error of a token, relative to the norm of its vector."""
    if found.numel() == 0:
        return 0.0
    difference = (found.double() - expected.double()).norm(dim=-1)
    errors = difference / expected.double().norm(dim=-1)
    return float(errors.median() if median else errors.max())


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape: tuple[int, int, int]) -> None:
    x, weight, scale_inv = case(shape, torch.float32)
    codes, scales = quantize_activations(x)
    expected = torch.zeros(shape[0], shape[1], dtype=torch.float64)
    for output in range(0, shape[1], 40):
        for channel in range(shape[2]):
            expected[:, output] += (
                codes[:, channel].double()
                * weight[output, channel].double()
                * scales[:, channel // 128].double()
                * scale_inv[output // 128, channel // 128].double()
            )
    found = block_fp8_linear_reference(x, weight, scale_inv)
    assert found.shape == expected.shape
    assert error(found[:, ::40], expected[:, ::40]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_fast_path_in_float32(shape: tuple[int, int, int]) -> None:
    """Scales multiplied in beforehand: float32's rounding, no more than another order of the
    sum makes."""
    x, weight, scale_inv = case(shape, torch.float32)
    reference = block_fp8_linear_reference(x, weight, scale_inv)
    assert error(block_fp8_linear(x, weight, scale_inv), reference) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_fast_path_in_bfloat16(shape: tuple[int, int, int]) -> None:
    """Both operands rounded to bfloat16: as far from the truth as any product in bfloat16."""
    x, weight, scale_inv = case(shape, torch.bfloat16)
    exact = block_fp8_linear_reference(x.float(), weight, scale_inv)
    dense = dequantize_blocks(weight, scale_inv)
    plain = torch.nn.functional.linear(x, dense.bfloat16())
    rounding = error(plain, torch.nn.functional.linear(x.float(), dense))
    assert error(block_fp8_linear(x, weight, scale_inv), exact) <= 2 * rounding
    # Small beside what rounding the activations to fp8 does.
    quantisation = error(exact, torch.nn.functional.linear(x.float(), dense))
    assert rounding < 0.25 * quantisation or shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer(dtype: torch.dtype) -> None:
    x, weight, scale_inv = case((6, 200, 300), dtype)
    layers = {}
    for cache in ("once", "call"):
        layer = Fp8Linear(300, 200, weight_cache=cache)
        layer.weight.data.copy_(weight)
        layer.weight_scale_inv.data.copy_(scale_inv)
        layers[cache] = layer
        assert list(layer.state_dict()) == ["weight", "weight_scale_inv"]
        assert layer.weight_scale_inv.shape == (2, 3)
    expected = block_fp8_linear(x, weight, scale_inv)
    for layer in layers.values():
        for _ in range(2):
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(layer.prepare(x)), expected)
        assert layer(x.view(2, 3, 300)).shape == (2, 3, 200)
    assert layers["once"].dense(dtype) is layers["once"].dense(dtype)
    assert layers["call"].dense(dtype) is not layers["call"].dense(dtype)
    # A weight filled anew is used once the old one is forgotten.
    layers["once"].weight_scale_inv.data.mul_(2)
    layers["once"].forget_dense()
    assert torch.equal(layers["once"](x), 2 * expected)


def test_other_dtypes_leave_the_codes_alone() -> None:
    layer = Fp8Linear(128, 128).to(torch.bfloat16).half().float()
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight_scale_inv.dtype == torch.float32


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    register_fp8_kernels("cpu", ReferenceKernels())
    yield
    register_fp8_kernels("cpu", None)


def test_kernels_take_over(reference_kernels: None) -> None:
    x, weight, scale_inv = case((3, 63, 123), torch.bfloat16)
    ready = prepare(x)
    assert ready.values.dtype == torch.float8_e4m3fn
    assert ready.scales is not None
    found = block_fp8_linear(ready, weight, scale_inv)
    assert torch.equal(found, block_fp8_linear_reference(x, weight, scale_inv))
    register_fp8_kernels("cpu", None)
    with pytest.raises(RuntimeError, match="no longer registered"):
        block_fp8_linear(ready, weight, scale_inv)
    assert fp8_kernels(torch.device("cpu")) is None


def test_grouped_reference() -> None:
    """Ragged groups, empty experts, experts that lie apart in memory."""
    generator = torch.Generator().manual_seed(4)
    counts = torch.tensor([0, 3, 1, 0, 5])
    x = torch.randn(9, 150, generator=generator)
    both = [quantize_blocks(torch.randn(140, 150, generator=generator)) for _ in counts]
    weight = torch.stack([torch.cat((w.view(torch.uint8),) * 2) for w, _ in both])
    weight = weight.view(torch.float8_e4m3fn)[:, :140]
    scale_inv = torch.stack([s for _, s in both])
    kernels = ReferenceKernels()
    found = kernels.grouped_linear(
        *quantize_activations(x), weight, scale_inv, counts, (128, 128), torch.float32
    )
    expert_of = torch.repeat_interleave(torch.arange(5), counts)
    for row, expert in enumerate(expert_of.tolist()):
        expected = block_fp8_linear_reference(x[row], *both[expert])
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_by_kernels_and_by_groups(
    checkpoint: Path, dtype: torch.dtype, reference_kernels: None
) -> None:
    experts = load_model(checkpoint, dtype=dtype, last_layer=1).layers[1].mlp.experts
    assert isinstance(experts, Fp8Experts)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(70, 64, generator=generator).to(dtype)
    chosen = torch.rand(70, 8, generator=generator).topk(2).indices
    chosen[chosen == 6] = 5  # an expert without tokens
    weights = torch.rand(70, 2, generator=generator)
    by_kernels = experts(x, chosen, weights)
    in_groups = torch.zeros(70, 64)
    for first in (0, 3, 7):
        part = _some_of(experts, range(first, {0: 3, 3: 7, 7: 8}[first]))
        part.add_part(in_groups, x, chosen, weights, first)
    assert torch.equal(in_groups.to(dtype), by_kernels)
    register_fp8_kernels("cpu", None)
    distinct = chosen[:, 0] != chosen[:, 1]
    plain = experts(x, chosen, weights)
    # bfloat16's rounding sends some of the inner activations to the next fp8 number.
    by_kernels, plain = by_kernels[distinct], plain[distinct]
    assert error(by_kernels, plain) < 0.1
    if dtype == torch.float32:  # another order of the sum sends hardly any
        assert error(by_kernels, plain, median=True) < 1e-5


def _some_of(experts: Fp8Experts, kept: range) -> Fp8Experts:
    class Shape:
        n_routed_experts, moe_intermediate_size, hidden_size = len(kept), 32, 64

    part = Fp8Experts(Shape(), "cpu", count=len(kept))  # type: ignore[arg-type]  # all it reads
    for name, value in part.state_dict().items():
        value.copy_(experts.state_dict()[name][kept.start : kept.stop])
    return part


def test_a_whole_model_by_kernels(checkpoint: Path) -> None:
    """The published formula throughout, against the fast path, in float32."""
    engine = LocalEngine.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(6))
    plain = engine.residuals(tokens, 0)
    register_fp8_kernels("cpu", ReferenceKernels())
    try:
        found = engine.residuals(tokens, 0)
        assert error(found, plain) < 0.1
        assert error(found, plain, median=True) < 1e-5  # few are sent to the next fp8 number
        assert engine.logits(tokens).isfinite().all()
        assert len(engine.generate([[1, 2, 3]], 5)[0].tokens) == 8
    finally:
        register_fp8_kernels("cpu", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w8a8_is_near_the_unquantised_model(checkpoint: Path, dtype: torch.dtype) -> None:
    """fp8 has three bits: a few percent, after one block."""
    tokens = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(7))
    quantised = LocalEngine.from_pretrained(checkpoint, dtype=dtype).residuals(tokens, 0)
    exact = LocalEngine.from_pretrained(checkpoint, dtype=torch.float32, fp8="dequantize")
    difference = error(quantised, exact.residuals(tokens, 0))
    assert 1e-3 < difference < 0.1


def test_cached_decode_equals_prefill(checkpoint: Path) -> None:
    """To rounding, which fp8 makes steps of: a last bit may send a number to the next fp8 one,
    and now and then a token to another expert. So the median is judged."""
    model = load_model(checkpoint, dtype=torch.float32)
    tokens = torch.randint(0, 96, (8, 40), generator=torch.Generator().manual_seed(9))
    whole = model.residual(tokens)
    cache = LatentCache(
        model.config, torch.full((8,), 20), layers=4, capacity=40, dtype=torch.float32
    )
    model.residual(tokens[:, :20], cache=cache)
    for place in range(20, 40):
        step = model.step(tokens[:, place : place + 1], cache)
        difference = (step[:, 0] - whole[:, place]).norm(dim=-1) / whole[:, place].norm(dim=-1)
        assert difference.median() < 1e-5, place


def test_cached_weights_change_no_bit(checkpoint: Path) -> None:
    tokens = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(8))
    found = [
        LocalEngine.from_pretrained(checkpoint, weight_cache=cache).logits(tokens)
        for cache in ("once", "call", "auto")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_settings_are_checked_and_plain_checkpoints_run(
    checkpoint: Path, make_model: Callable[..., R1Model], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"fp8 is 'w4a4', expected one of w8a8, dequantize"):
        load_model(checkpoint, fp8="w4a4")  # type: ignore[arg-type]  # the point of it
    with pytest.raises(ValueError, match="weight_cache is 'never'"):
        load_model(checkpoint, weight_cache="never")  # type: ignore[arg-type]  # the point of it
    from r1sae_fast.r1.checkpoint import write_checkpoint

    model = make_model()
    write_checkpoint(tmp_path, model.config, model.state_dict(), fp8=False)
    plain = load_model(tmp_path, dtype=torch.float32)
    assert plain.fp8 == "none"
    assert not any(isinstance(module, Fp8Linear) for module in plain.modules())
    assert load_model(checkpoint).fp8 == "w8a8"
    assert load_model(checkpoint, fp8="dequantize").fp8 == "dequantize"
