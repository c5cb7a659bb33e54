"""Triton's row top-k encoding: to the index on sums that no order of adding changes, else to the
rounding of a float32 sum."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from r1sae_fast.ops.topk import topk_reference
from r1sae_fast.triton_kernels import encode_gemm
from r1sae_fast.triton_kernels.encode_topk import encode_topk, encode_topk_traffic

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUICK = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def whole_numbers(
    rows: int, d_in: int, d_sae: int, dtype: torch.dtype, seed: int, bias: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W_enc [d_in, d_sae] stored by feature, b_enc: small whole numbers, many ties, exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    x, weight = draw(-1, 2, rows, d_in), draw(-1, 2, d_sae, d_in)
    return x, weight.T, draw(-bias, bias + 1, d_sae)


def reference(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
) -> tuple[torch.Tensor, ...]:
    dtype = x.dtype
    pre = ((x.float() @ W_enc.float()).to(dtype) + b_enc).relu()
    return topk_reference(pre, k, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@QUICK
@given(
    rows=st.sampled_from([0, 1, 5, 17]),
    d_in=st.sampled_from([1, 16, 63]),
    d_sae=st.sampled_from([1, 40, 63, 123, 192]),
    k=st.sampled_from([0, 1, 5, 63, None]),
    by_feature=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_reference_to_the_index(
    dtype: torch.dtype,
    rows: int,
    d_in: int,
    d_sae: int,
    k: int | None,
    by_feature: bool,
    seed: int,
    device: torch.device,
) -> None:
    k = d_sae if k is None else min(k, d_sae)
    x, W_enc, b_enc = whole_numbers(rows, d_in, d_sae, dtype, seed)
    weight = W_enc if by_feature else W_enc.contiguous()
    found = encode_topk(x.to(device), weight.to(device), b_enc.to(device), k)
    for mine, theirs in zip(found.compact(), reference(x, W_enc, b_enc, k), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert found.indices.shape == (rows, k)


@pytest.mark.parametrize("bias", [-100.0, 0.0, 7.0], ids=["all negative", "all zero", "all equal"])
def test_rows_without_order(bias: float, device: torch.device) -> None:
    x, W_enc = torch.zeros(3, 16), torch.zeros(16, 100)
    b_enc = torch.full((100,), bias)
    found = encode_topk(x.to(device), W_enc.to(device), b_enc.to(device), 5)
    values, indices, offsets = (part.cpu() for part in found.compact())
    expected = [0, 1, 2, 3, 4] * 3 if bias > 0 else []
    assert indices.tolist() == expected
    assert values.tolist() == [7.0] * len(expected)
    assert offsets.tolist() == [len(expected) // 3 * row for row in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("guarded", "grid_order")
def test_several_chunks_write_all_and_nothing_else(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("encode_gemm", "encode_topk"):
        monkeypatch.setattr(f"r1sae_fast.triton_kernels.{module}.CHUNK", 16)
    x, W_enc, b_enc = (t.to(device) for t in whole_numbers(37, 40, 123, dtype, 1))
    found = encode_topk(x, W_enc, b_enc, 9)
    for mine, theirs in zip(found.compact(), reference(x, W_enc, b_enc, 9), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_numbers_within_rounding(dtype: torch.dtype, device: torch.device) -> None:
    """Every code is a pre-activation to rounding, and none left out is larger beyond rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 120, generator=generator).to(dtype)
    weight = torch.randn(200, 120, generator=generator).to(dtype)
    b_enc = torch.randn(200, generator=generator).to(dtype)
    found = encode_topk(x.to(device), weight.to(device).T, b_enc.to(device), 12)
    pre = x.double() @ weight.double().T + b_enc.double()
    size = x.double().abs() @ weight.double().abs().T + b_enc.double().abs()
    eps = torch.finfo(dtype).eps
    allowed = size * 122 * torch.finfo(torch.float32).eps / 2 + pre.abs() * eps + eps * size * 0.5
    values, indices = found.values.cpu().double(), found.indices.cpu().long()
    assert bool(((values - pre.gather(1, indices)).abs() <= allowed.gather(1, indices)).all())
    left_out = pre.scatter(1, indices, -torch.inf) - 2 * allowed
    assert bool((left_out.max(1).values <= values.min(1).values).all())


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_first_bad_row_is_named(bad: float, device: torch.device) -> None:
    x, W_enc, b_enc = whole_numbers(40, 16, 100, torch.float32, 0)
    x[37, 3] = bad
    x[23, 15] = bad
    moved = [t.to(device) for t in (x, W_enc, b_enc)]
    assert int(encode_topk(*moved, 3, check_finite=True).bad_row) == 23
    moved[0] = x.nan_to_num(0, 0, 0).to(device)
    assert int(encode_topk(*moved, 3, check_finite=True).bad_row) > 40


def test_k_out_of_range() -> None:
    x, W_enc, b_enc = whole_numbers(1, 16, 600, torch.float32, 0)
    for k in (-1, 513):
        with pytest.raises(ValueError, match=f"k is {k}; expected 0 to 512"):
            encode_topk(x, W_enc, b_enc, k)


def test_traffic_has_no_dense_codes() -> None:
    traffic = encode_topk_traffic(4096, 7168, 28672, 64)
    assert traffic.scratch <= 1.05 * encode_gemm.CHUNK * 28672 * 4
    # The scratch is written once; selection reads an eighth of it at most.
    written = 4096 * 28672 * 2
    assert traffic.hbm_written < 1.06 * written
    weights = 4 * 7168 * 28672 * 2
    assert traffic.hbm_read < weights + 4096 * 7168 * 2 + written / 8
    assert traffic.flops == 2 * 4096 * 7168 * 28672
