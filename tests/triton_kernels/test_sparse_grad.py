"""Triton's sparse gradients against the dense products in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from r1sae_fast.ops.decode import _values_reference, _weight_reference
from r1sae_fast.triton_kernels.sparse_grad import (
    feature_major,
    gradient_of_values,
    gradient_of_values_traffic,
    gradient_of_weight,
    gradient_of_weight_traffic,
)

from .test_decode import problem

QUICK = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPES = {
    "rows": st.integers(0, 6),
    "d_sae": st.sampled_from([1, 40, 123]),
    "d_in": st.sampled_from([1, 16, 63, 64, 123]),
    "seed": st.integers(0, 2**31),
}
EPS = torch.finfo(torch.float32).eps


def smallest(dtype: torch.dtype) -> float:
    """The step between subnormal numbers: what is so small rounds to multiples, not to digits."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@QUICK
@given(**SHAPES)
def test_of_values(
    dtype: torch.dtype, rows: int, d_sae: int, d_in: int, seed: int, device: torch.device
) -> None:
    (_, indices, offsets), weight, _, gradient = problem(rows, d_sae, d_in, dtype, seed)
    found = gradient_of_values(*(t.to(device) for t in (gradient, indices, offsets, weight))).cpu()
    assert found.dtype == dtype
    truth = _values_reference(gradient.double(), indices, offsets, weight.double())
    size = _values_reference(gradient.double().abs(), indices, offsets, weight.double().abs())
    allowed = (torch.finfo(dtype).eps / 2 + (d_in + 2) * EPS / 2) * size + smallest(dtype)
    assert bool(((found.double() - truth).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@QUICK
@given(**SHAPES)
def test_of_weight(
    dtype: torch.dtype, rows: int, d_sae: int, d_in: int, seed: int, device: torch.device
) -> None:
    (values, indices, offsets), _, _, gradient = problem(rows, d_sae, d_in, dtype, seed)
    on_device = [t.to(device) for t in (gradient, values, indices, offsets)]
    by_feature = feature_major(on_device[2], on_device[3], d_sae)
    found, sums = gradient_of_weight(*on_device[:2], by_feature, with_sums=True)
    assert sums is not None
    assert (found.dtype, sums.dtype) == (dtype, dtype)
    wide = [gradient.double(), values.double()]
    truth = _weight_reference(*wide, indices, offsets, d_sae)
    size = _weight_reference(*(t.abs() for t in wide), indices, offsets, d_sae)
    rounding = torch.finfo(dtype).eps / 2 + (rows + 2) * EPS / 2
    allowed = rounding * size + smallest(dtype)
    assert bool(((found.cpu().double() - truth).abs() <= allowed).all())
    true_sums = torch.zeros(d_sae, dtype=torch.float64).index_add(0, indices.long(), wide[1])
    allowed = rounding * true_sums + smallest(dtype)
    assert bool(((sums.cpu().double() - true_sums).abs() <= allowed).all())

    some = torch.arange(d_sae - 1, -1, -2, device=device)
    part, none = gradient_of_weight(*on_device[:2], by_feature, features=some)
    assert none is None
    assert torch.equal(part, found[some])


def test_by_feature_is_the_transpose() -> None:
    (_, indices, offsets), *_ = problem(9, 40, 1, torch.float32, 3)
    by_feature = feature_major(indices, offsets, 40)
    rows = torch.repeat_interleave(torch.arange(9), offsets.diff())
    pairs = sorted(zip(indices.tolist(), rows.tolist(), strict=True))
    found = zip(indices[by_feature.order].tolist(), by_feature.rows.tolist(), strict=True)
    assert list(found) == pairs
    assert torch.equal(by_feature.offsets.diff(), torch.bincount(indices, minlength=40))


@pytest.mark.usefixtures("guarded", "grid_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_all_of_its_output_and_nothing_else(
    dtype: torch.dtype, device: torch.device
) -> None:
    (values, indices, offsets), weight, _, gradient = problem(4, 40, 63, dtype, 1)
    moved = [t.to(device) for t in (gradient, values, indices, offsets, weight)]
    assert not gradient_of_values(moved[0], moved[2], moved[3], moved[4]).isnan().any()
    by_feature = feature_major(moved[2], moved[3], 40)
    for part in gradient_of_weight(moved[0], moved[1], by_feature, with_sums=True):
        assert part is not None
        assert not part.isnan().any()


def test_traffic_is_that_of_sparse_work() -> None:
    rows, k, d_sae, d_in = 4096, 64, 28672, 7168
    dense = 2.0 * rows * d_sae * d_in
    values = gradient_of_values_traffic(rows, k, d_sae, d_in)
    weight = gradient_of_weight_traffic(rows, k, d_sae, d_in)
    for traffic in (values, weight):
        assert traffic.flops == dense * k / d_sae
    # Never the size of dense codes; less than twice the weights and gradients themselves.
    assert values.scratch < rows * d_sae * 4 / 20
    assert values.hbm < 1.3 * (d_sae + rows) * d_in * 2
    assert weight.hbm < 1.3 * (d_sae * d_in * 4 + rows * d_in * 2)
