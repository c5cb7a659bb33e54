"""Triton's sparse decode against the dense product in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from r1sae_fast.ops.decode import decode_reference
from r1sae_fast.triton_kernels.decode import decode, decode_error, decode_traffic

from .conftest import ON_GPU

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(
    rows: int, d_sae: int, d_in: int, dtype: torch.dtype, seed: int, density: float = 0.2
) -> tuple[Codes, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ragged codes (some rows empty), W_dec, b_dec, x."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, d_sae, generator=generator) < density
    chosen &= torch.rand(rows, 1, generator=generator) < 0.8
    indices = chosen.nonzero()[:, 1].int()
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = chosen.sum(1).cumsum(0)
    values = torch.rand(indices.shape[0], generator=generator).to(dtype)
    W_dec, b_dec, x = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((d_sae, d_in), (d_in,), (rows, d_in))
    )
    return (values, indices, offsets), W_dec, b_dec, x


def bound(codes: Codes, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    """How far rounding can bring a float32 sum of that length, rounded once to the dtype."""
    values, indices, offsets = codes
    size = decode_reference(values.double().abs(), indices, offsets, W_dec.double().abs(), None)
    size = size + b_dec.double().abs()
    terms = int(offsets.diff().max()) + 1 if offsets.shape[0] > 1 else 1
    dtype_eps = torch.finfo(values.dtype).eps / 2
    # What is smaller rounds to multiples of this, not to digits.
    tiny = torch.finfo(values.dtype).tiny * torch.finfo(values.dtype).eps
    return (dtype_eps + (terms + 1) * torch.finfo(torch.float32).eps / 2) * size + tiny


def exact(codes: Codes, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    values, indices, offsets = codes
    return decode_reference(values.double(), indices, offsets, W_dec.double(), b_dec.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(0, 5),
    d_sae=st.sampled_from([1, 40, 123]),
    d_in=st.sampled_from([1, 16, 63, 64, 123]),
    seed=st.integers(0, 2**31),
)
def test_is_the_dense_product(
    dtype: torch.dtype, rows: int, d_sae: int, d_in: int, seed: int, device: torch.device
) -> None:
    codes, W_dec, b_dec, x = problem(rows, d_sae, d_in, dtype, seed)
    moved = [tensor.to(device) for tensor in (*codes, W_dec, b_dec)]
    found = decode(*moved).cpu()
    assert found.dtype == dtype
    truth = exact(codes, W_dec, b_dec)
    assert bool(((found.double() - truth).abs() <= bound(codes, W_dec, b_dec)).all())

    output, error, squared = decode_error(*moved[:4], x.to(device), moved[4])
    assert output is not None
    assert error is not None
    assert torch.equal(output.cpu(), found)
    difference = x.float() - found.float()
    assert torch.equal(error.cpu(), difference.to(dtype))
    torch.testing.assert_close(squared.cpu(), difference.square().sum(1), rtol=1e-5, atol=1e-12)


@pytest.mark.usefixtures("guarded", "grid_order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_all_of_its_output_and_nothing_else(
    dtype: torch.dtype, device: torch.device
) -> None:
    codes, W_dec, b_dec, x = problem(3, 40, 63, dtype, 0)
    moved = [tensor.to(device) for tensor in (*codes, W_dec, x, b_dec)]
    for tensor in decode_error(*moved):
        assert tensor is not None
        assert not tensor.isnan().any()


def test_the_order_of_programs_and_empty_rows_do_not_show(
    device: torch.device, grid_order: None
) -> None:
    codes, W_dec, b_dec, _ = problem(4, 40, 64, torch.float32, 7)
    found = decode(*(tensor.to(device) for tensor in (*codes, W_dec, b_dec))).cpu()
    values, indices, offsets = codes
    for row in range(4):
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        alone = (values[part], indices[part], torch.tensor([0, part.stop - part.start]))
        again = decode(*(tensor.to(device) for tensor in (*alone, W_dec, b_dec))).cpu()
        assert torch.equal(again[0], found[row])
    nothing = (values[:0], indices[:0], torch.zeros(3, dtype=torch.int64))
    found = decode(*(tensor.to(device) for tensor in (*nothing, W_dec, b_dec))).cpu()
    assert torch.equal(found, b_dec.expand(2, -1))


def test_all_features_of_a_row(device: torch.device) -> None:
    codes, W_dec, b_dec, _ = problem(2, 123, 40, torch.float32, 3, density=1.1)
    found = decode(*(tensor.to(device) for tensor in (*codes, W_dec, b_dec))).cpu()
    truth = exact(codes, W_dec, b_dec)
    assert bool(((found.double() - truth).abs() <= bound(codes, W_dec, b_dec)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_weights(dtype: torch.dtype, device: torch.device) -> None:
    """Every finite e4m3 byte, scaled a feature, against its value in float64."""
    codes, _, b_dec, _ = problem(5, 2, 127, dtype, 5, density=0.9)
    half = torch.arange(127, dtype=torch.uint8)
    weights = torch.stack([half, half + 128]).view(torch.float8_e4m3fn)
    scales = torch.tensor([0.01, 3.0])
    moved = [tensor.to(device) for tensor in (*codes, weights, b_dec)]
    found = decode(*moved, scales=scales.to(device)).cpu()
    wide = weights.double() * scales.double()[:, None]
    truth = exact(codes, wide, b_dec)
    values = codes[0].double()
    allowed = bound((values, *codes[1:]), wide, b_dec) + torch.finfo(dtype).eps * truth.abs()
    allowed = allowed + 4 * torch.finfo(torch.float32).eps * bound_size(codes, wide, b_dec)
    assert bool(((found.double() - truth).abs() <= allowed).all())


def bound_size(codes: Codes, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    values, indices, offsets = codes
    return exact((values.abs(), indices, offsets), W_dec.abs(), b_dec.abs())


def test_a_tile_is_read_once_from_memory() -> None:
    traffic = decode_traffic(4096, 64, 28672, 7168)
    assert traffic.hbm_read < 1.01 * 28672 * 7168 * 2
    assert traffic.hbm_written == 4096 * 7168 * 2
    few = decode_traffic(8, 64, 28672, 7168)
    assert few.hbm_read < 1.01 * 512 * 7168 * 2  # only the features in use
    assert traffic.scratch == 0


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_reference_on_the_device(device: torch.device) -> None:
    codes, W_dec, b_dec, _ = problem(64, 4096, 7168, torch.bfloat16, 0, density=0.02)
    moved = [tensor.to(device) for tensor in (*codes, W_dec, b_dec)]
    torch.testing.assert_close(decode(*moved), decode_reference(*moved), rtol=0.02, atol=0.05)
