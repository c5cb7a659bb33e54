"""Sparse decoding and its gradients against the dense product."""

from collections.abc import Iterator
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1sae_fast import SparseCodes, ops

LEVELS = ops.simd_info().available


@pytest.fixture(autouse=True)
def _auto_simd() -> Iterator[None]:
    yield
    ops.set_simd("auto")


def problem(
    rows: int, d_sae: int, d_in: int, seed: int, dtype: torch.dtype
) -> tuple[SparseCodes, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ragged codes (some rows empty), W_dec, b_dec and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    dense = normal(rows, d_sae) * (torch.rand((rows, d_sae), generator=generator) < 0.2)
    dense *= torch.rand((rows, 1), generator=generator) < 0.8
    codes = SparseCodes.from_dense(dense.to(dtype))
    return (
        codes,
        normal(d_sae, d_in).to(dtype),
        normal(d_in).to(dtype),
        normal(rows, d_in).to(dtype),
    )


def run(
    codes: SparseCodes, W_dec: torch.Tensor, b_dec: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the three gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (codes.values, W_dec, b_dec)]
    own = SparseCodes(inputs[0], codes.indices, codes.row_offsets, codes.d_sae)
    output = ops.decode(own, inputs[1], inputs[2])
    output.backward(gradient)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def dense_run(
    codes: SparseCodes,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    gradient: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """The same by torch, all dense, in ``dtype``."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in (codes.values, W_dec, b_dec)]
    own = SparseCodes(inputs[0], codes.indices, codes.row_offsets, codes.d_sae)
    output = own.to_dense() @ inputs[1] + inputs[2]
    output.backward(gradient.to(dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_no_further_from_the_truth_than_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    rows, d_sae = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([1, 40, 123]))
    d_in = data.draw(st.sampled_from([1, 7, 16, 63, 64, 123]))
    given_problem = problem(rows, d_sae, d_in, data.draw(st.integers(0, 2**31)), dtype)
    codes, *others = given_problem
    truth = dense_run(*given_problem, torch.float64)
    dense = dense_run(*given_problem, dtype)
    # The sums of the terms' magnitudes: what rounding is relative to.
    absolute = replace(codes, values=codes.values.abs())
    sizes = dense_run(absolute, *(tensor.abs() for tensor in others), torch.float64)
    terms = max(rows, d_sae, d_in)
    for level in LEVELS:
        ops.set_simd(level)
        found_all = run(*given_problem)
        for found, same_dtype, exact, size in zip(found_all, dense, truth, sizes, strict=True):
            assert (found.dtype, found.shape) == (dtype, exact.shape)
            allowed = (same_dtype.double() - exact).abs().max() if exact.numel() else 0.0
            # Where torch happens to be exact, ours may still round once to the dtype, and once a
            # term of its sums in fp32 (Higham 2002, eq. 3.5): at most d_sae, d_in or rows terms.
            rounding = torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps / 2
            allowed = 2 * allowed + rounding * size
            assert bool(((found.double() - exact).abs() <= allowed).all()), level


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(with_bias: bool) -> None:
    codes, W_dec, b_dec, _ = problem(4, 12, 5, 1, torch.float64)
    inputs = [codes.values, W_dec] + [b_dec] * with_bias

    def function(values: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        own = SparseCodes(values, codes.indices, codes.row_offsets, 12)
        return ops.decode(own, weight, *bias)

    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_leading_shapes_empty_rows_and_no_codes() -> None:
    W_dec, b_dec = torch.randn(6, 4), torch.randn(4)
    for leading in [(), (0,), (3,), (2, 0), (2, 2)]:
        codes = SparseCodes.from_dense(torch.zeros(*leading, 6))
        output = ops.decode(codes, W_dec, b_dec)
        assert output.shape == (*leading, 4)
        assert torch.equal(output, b_dec.expand(*leading, 4))
        assert torch.equal(ops.decode(codes, W_dec), torch.zeros(*leading, 4))


def test_a_strided_weight_is_read_right() -> None:
    codes, W_dec, b_dec, _ = problem(5, 40, 30, 2, torch.float32)
    strided = W_dec.T.contiguous().T
    assert torch.equal(ops.decode(codes, strided, b_dec), ops.decode(codes, W_dec, b_dec))


def test_bad_arguments_are_refused() -> None:
    codes, W_dec, b_dec, _ = problem(3, 6, 4, 3, torch.float32)
    with pytest.raises(ValueError, match=r"expected \(6, d_in\)"):
        ops.decode(codes, W_dec.T, b_dec)
    with pytest.raises(ValueError, match=r"b_dec has shape \(6,\); expected \(4,\)"):
        ops.decode(codes, W_dec, torch.zeros(6))
    with pytest.raises(TypeError, match=r"float32 but W_dec torch\.float64"):
        ops.decode(codes, W_dec.double())
    with pytest.raises(ValueError, match="cpu but W_dec on meta"):
        ops.decode(codes, W_dec.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [-1, 6])
def test_codes_out_of_range_are_refused_not_read(dtype: torch.dtype, index: int) -> None:
    codes = SparseCodes(
        torch.ones(2, dtype=dtype),
        torch.tensor([0, index], dtype=torch.int32),
        torch.tensor([0, 1, 2]),
        6,
    )
    with pytest.raises(ValueError, match=f"row 1 names feature {index}"):
        ops.decode(codes, torch.ones(6, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
# torch's own tester reads .grad of tensors that are no leaves, whatever the operation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(dtype: torch.dtype, gradient: bool, with_bias: bool) -> None:
    codes, W_dec, b_dec, upstream = problem(4, 12, 5, 4, dtype)
    own = torch.ops.r1sae_fast
    sparse = (codes.indices, codes.row_offsets)
    for tensor in (codes.values, W_dec, b_dec, upstream):
        tensor.requires_grad_(gradient)
    bias = b_dec if with_bias else None
    torch.library.opcheck(own.decode.default, (codes.values, *sparse, W_dec, bias))
    torch.library.opcheck(own.decode_gradient_of_values.default, (upstream, *sparse, W_dec))
    torch.library.opcheck(
        own.decode_gradient_of_weight.default, (upstream, codes.values, *sparse, 12)
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_weights_in_16_bits_are_widened(
    level: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    ops.set_simd(level)
    rows, d_sae = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([1, 40, 123]))
    d_in = data.draw(st.sampled_from([1, 7, 16, 63, 64, 123]))
    seed = data.draw(st.integers(0, 2**31))
    codes, W_dec, b_dec, gradient = problem(rows, d_sae, d_in, seed, torch.float32)
    kept = W_dec.to(dtype)
    found = run(codes, kept, b_dec, gradient)
    expected = run(codes, kept.float(), b_dec, gradient)
    expected[2] = expected[2].to(dtype)
    assert all(map(torch.equal, found, expected))


def test_weights_in_16_bits_stand_beside_float32_alone() -> None:
    codes, W_dec, b_dec, _ = problem(3, 4, 5, 0, torch.float32)
    for values in (torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match="float16"):
            ops.decode(codes.to(values), W_dec.half(), b_dec.to(values))
    with pytest.raises(TypeError, match="b_dec"):
        ops.decode(codes, W_dec.half(), b_dec.half())
