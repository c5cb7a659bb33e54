"""Batch top-k and threshold encoding, and the radix k-th value, against torch, to the index."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from r1sae_fast.ops.batch_topk import batch_topk_reference
from r1sae_fast.ops.threshold import threshold_reference
from r1sae_fast.triton_kernels.encode_batch_topk import (
    encode_batch_topk,
    encode_batch_topk_traffic,
)
from r1sae_fast.triton_kernels.encode_threshold import (
    encode_threshold,
    encode_threshold_traffic,
)
from r1sae_fast.triton_kernels.kth_value import kth_value, kth_value_traffic

from .test_encode_topk import whole_numbers

DTYPES = [torch.float32, torch.bfloat16]
QUICK = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pre_activations(x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor) -> torch.Tensor:
    return (x.float() @ W_enc.float()).to(x.dtype) + b_enc


def small_chunks(patch: pytest.MonkeyPatch) -> None:
    for module in ("encode_gemm", "encode_batch_topk", "encode_threshold"):
        patch.setattr(f"r1sae_fast.triton_kernels.{module}.CHUNK", 4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@QUICK
@given(
    count=st.sampled_from([0, 1, 63, 64, 200]), k=st.integers(1, 210), seed=st.integers(0, 2**31)
)
def test_kth_value(dtype: torch.dtype, count: int, k: int, seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, generator=generator).relu() * 100
    numbers[: count // 3] = numbers[: count // 3].round()  # ties
    numbers = numbers.to(dtype)
    found = kth_value(numbers.to(device), k)
    expected = numbers.float().sort(descending=True).values[k - 1] if k <= count else 0.0
    assert found.item() == float(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@QUICK
@given(
    rows=st.sampled_from([0, 1, 5, 11]),
    d_sae=st.sampled_from([1, 40, 123]),
    k=st.sampled_from([0, 1, 7, None]),
    seed=st.integers(0, 2**31),
)
def test_batch_topk(
    dtype: torch.dtype, rows: int, d_sae: int, k: int | None, seed: int, device: torch.device
) -> None:
    k = d_sae if k is None else min(k, d_sae)
    x, W_enc, b_enc = whole_numbers(rows, 16, d_sae, dtype, seed)
    if rows > 4:
        x[2] *= 3  # one row with most of the codes
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch)
        found, _ = encode_batch_topk(x.to(device), W_enc.to(device), b_enc.to(device), k)
    expected = batch_topk_reference(pre_activations(x, W_enc, b_enc), k, False)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@QUICK
@given(
    rows=st.sampled_from([0, 1, 5, 11]),
    d_sae=st.sampled_from([1, 40, 123]),
    bound=st.sampled_from([-1.0, 0.0, 2.0, 100.0, None]),
    seed=st.integers(0, 2**31),
)
def test_threshold(
    dtype: torch.dtype, rows: int, d_sae: int, bound: float | None, seed: int, device: torch.device
) -> None:
    x, W_enc, b_enc = whole_numbers(rows, 16, d_sae, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    each = torch.randint(-2, 6, (d_sae,), generator=generator).float()
    bounds = each if bound is None else torch.tensor([bound])
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch)
        found, _ = encode_threshold(
            x.to(device), W_enc.to(device), b_enc.to(device), bounds.to(device)
        )
    expected = threshold_reference(pre_activations(x, W_enc, b_enc), bounds, False)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.usefixtures("guarded", "grid_order")
def test_write_all_of_their_output_and_nothing_else(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch)
    x, W_enc, b_enc = whole_numbers(7, 16, 100, torch.float32, 0)
    moved = [t.to(device) for t in (x, W_enc, b_enc)]
    pre = pre_activations(x, W_enc, b_enc)
    found = [encode_batch_topk(*moved, 6)[0], encode_threshold(*moved, torch.ones(1))[0]]
    expected = [batch_topk_reference(pre, 6, False), threshold_reference(pre, torch.ones(1), False)]
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, theirs, strict=True))


def test_bad_rows_are_named(device: torch.device) -> None:
    x, W_enc, b_enc = (t.to(device) for t in whole_numbers(9, 16, 40, torch.float32, 0))
    x[5, 1] = torch.nan
    assert int(encode_batch_topk(x, W_enc, b_enc, 3, check_finite=True)[1]) == 5
    one = torch.ones(1, device=device)
    assert int(encode_threshold(x, W_enc, b_enc, one, check_finite=True)[1]) == 5


def test_traffic() -> None:
    rows, d_in, d_sae, k = 4096, 7168, 28672, 64
    products = 4 * d_in * d_sae * 2 + rows * d_sae * 2 * 33 / 32 + rows * d_in * 2
    for traffic in (
        encode_batch_topk_traffic(rows, d_in, d_sae, k),
        encode_threshold_traffic(rows, d_in, d_sae, k),
    ):
        assert traffic.hbm < 1.15 * products
        assert traffic.scratch < 1.05 * 1024 * d_sae * 2
    assert kth_value_traffic(100).hbm == 1600
