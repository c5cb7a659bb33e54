"""evaluate_reconstruction(): each figure is its definition's, computed densely in float64."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.evals import DensityHistogram, Figures, evaluate_reconstruction
from r1sae_fast.evals.sums import SEGMENTS, Sums
from r1sae_fast.shards import ActivationShards

Write = Callable[..., ActivationShards]


def expected(x: Tensor, reconstruction: Tensor, dense: Tensor) -> dict[str, Any]:
    """The obvious computation."""
    x, reconstruction = x.double(), reconstruction.double()
    on = dense != 0
    error = (x - reconstruction).square().sum()
    there = x.norm(dim=1) > 0
    cosine = torch.nn.functional.cosine_similarity(x, reconstruction, eps=1e-300)[there]
    variance = (x - x.mean(0)).square().sum()
    return {
        "rows": len(x),
        "fvu": float(error / variance),
        "mse": float(error / len(x)),
        "cosine": float(cosine.mean()),
        "norm_ratio": float((reconstruction.norm(dim=1) / x.norm(dim=1))[there].mean()),
        "l0": float(on.sum(1).double().mean()),
        "l0_counts": torch.bincount(on.sum(1)),
        "density": on.double().mean(0),
        "dead_fraction": float((~on.any(0)).double().mean()),
        "dense_fraction": float((on.double().mean(0) > 0.1).double().mean()),
    }


def check(found: Figures, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        got = getattr(found, name)
        if isinstance(value, Tensor):
            torch.testing.assert_close(got, value, msg=name)
        else:
            assert got == pytest.approx(value, rel=1e-9, nan_ok=True), name
    assert found.explained_variance == pytest.approx(1 - found.fvu, nan_ok=True)


def make_sae(d_in: int = 24, d_sae: int = 60) -> FastSAE:
    """Rounded weights, so that strengths tie; five features that never fire; one without a
    direction."""
    generator = torch.Generator().manual_seed(1)
    sae = FastSAE(d_in, d_sae, 5, mode="topk").requires_grad_(False)
    sae.W_dec.copy_(torch.randint(-2, 3, (d_sae, d_in), generator=generator).float())
    sae.W_enc.copy_(sae.W_dec.T)
    sae.W_dec.mul_(0.05)
    sae.b_enc[7:12] = -1e6
    sae.W_dec[20] = 0
    sae.threshold.fill_(9.0)
    return sae


def make_rows(count: int, d_in: int = 24) -> Tensor:
    """Small integers, far from the origin in some dimensions; some rows are 0."""
    rows = torch.randint(-3, 4, (count, d_in), generator=torch.Generator().manual_seed(2)).float()
    rows[:, 0] += 1000
    rows[::17] = 0
    return rows


@pytest.mark.parametrize("mode", ["topk", "threshold", "batch_topk"])
@pytest.mark.parametrize("batch_rows", [7, 63, 10_000])
def test_figures_are_those_of_the_definitions(
    write_rows: Write, mode: Any, batch_rows: int
) -> None:
    sae, rows = make_sae(), make_rows(211)
    segment = torch.tensor([0, 1, 1, 2, 255])[torch.arange(211) % 5]
    found = evaluate_reconstruction(
        sae, write_rows(rows, segment), mode=mode, batch_rows=batch_rows, norm_limit=math.inf
    )
    assert sae.mode == "topk"
    sae.mode = mode
    parts = [sae(part) for part in rows.split(batch_rows)]  # type: ignore[no-untyped-call]
    reconstruction = torch.cat([part for part, _ in parts])
    dense = torch.cat([codes.to_dense() for _, codes in parts])
    check(found, expected(rows, reconstruction, dense))
    assert (found.mode, found.outliers, found.non_finite) == (mode, 0, 0)
    assert list(found.segments) == ["prompt", "thinking", "response", "unknown"]
    for number, name in zip((0, 1, 2, 255), SEGMENTS, strict=True):
        chosen = segment == number
        check(found.segments[name], expected(rows[chosen], reconstruction[chosen], dense[chosen]))


def test_a_perfect_and_a_zero_sae(
    write_rows: Write,
    make_identity: Callable[[int], FastSAE],
    make_zero: Callable[[int], FastSAE],
) -> None:
    shards = write_rows(torch.randn(100, 16, generator=torch.Generator().manual_seed(0)) + 5)
    perfect = evaluate_reconstruction(make_identity(16), shards)
    assert (perfect.fvu, perfect.explained_variance, perfect.mse) == (0.0, 1.0, 0.0)
    assert perfect.cosine == pytest.approx(1.0)
    assert perfect.norm_ratio == 1.0
    assert perfect.l0 == 16.0
    nothing = evaluate_reconstruction(make_zero(16), shards)
    rows = shards[:].activations.double()
    variance = (rows - rows.mean(0)).square().sum()
    assert nothing.fvu == pytest.approx(float(rows.square().sum() / variance))
    assert (nothing.cosine, nothing.norm_ratio, nothing.l0) == (0.0, 0.0, 0.0)
    assert (nothing.dead_fraction, nothing.dense_fraction) == (1.0, 0.0)
    assert nothing.density_histogram.silent == 32
    assert sum(nothing.density_histogram.counts) == 0
    assert nothing.l0_counts.tolist() == [100]


def test_equal_rows_have_no_variance_to_explain(write_rows: Write) -> None:
    found = evaluate_reconstruction(make_sae(), write_rows(torch.full((9, 24), 0.1)))
    assert math.isnan(found.fvu)
    assert math.isnan(found.explained_variance)
    assert found.mse > 0


def test_a_large_mean_costs_no_digits(write_rows: Write) -> None:
    rows = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)) + 1e5
    sae = make_sae()
    found = evaluate_reconstruction(sae, write_rows(rows))
    check(found, expected(rows, sae(rows)[0], sae(rows)[1].to_dense()))


def test_what_is_left_out_is_counted(write_rows: Write) -> None:
    sae, rows = make_sae(), make_rows(200)
    rows[3, 2] = math.nan
    rows[100, 0] = math.inf
    rows[50:54] = 1e6
    rows[60] = 3e38  # finite, though its norm in float32 is not
    shards = write_rows(rows, 1, check_finite=False)
    found = evaluate_reconstruction(sae, shards, batch_rows=64)
    assert (found.rows, found.outliers, found.non_finite, found.left_out) == (193, 5, 2, 7)
    good = rows.isfinite().all(1) & (rows[:, 1].abs() < 1e5)
    check(found, expected(rows[good], *dense_pass(sae, rows[good])))
    assert found.norm_limit == pytest.approx(10 * float(rows[good].norm(dim=1).median()), rel=1e-3)
    sae.metadata["norm_limit"] = 999.0
    told = evaluate_reconstruction(sae, shards, batch_rows=64)
    assert told.norm_limit == 999.0
    assert told.rows == int((rows[good].norm(dim=1) <= 999).sum())
    assert told.rows + told.left_out == 200
    with pytest.raises(ValueError, match=r"of 200, 2 hold NaN or infinities and 198 have a norm"):
        evaluate_reconstruction(sae, write_rows(rows + 1, check_finite=False), norm_limit=1e-3)


def dense_pass(sae: FastSAE, rows: Tensor) -> tuple[Tensor, Tensor]:
    reconstruction, codes = sae(rows)
    return reconstruction, codes.to_dense()


def test_some_of_the_rows(write_rows: Write) -> None:
    shards = write_rows(make_rows(200))
    found = evaluate_reconstruction(make_sae(), shards, max_rows=70, batch_rows=33)
    assert found.rows == 70
    assert int(found.l0_counts.sum()) == 70


def test_quantiles_and_histogram() -> None:
    density = torch.tensor([0.0, 0.0, 1e-9, 1e-8, 10**-0.5, 0.5, 1.0, 0.0999, 0.1]).double()
    histogram = DensityHistogram.of(density)
    assert histogram.silent == 2
    assert sum(histogram.counts) == 7
    for low, high, count in zip(
        histogram.edges, histogram.edges[1:], histogram.counts, strict=False
    ):
        low = 0.0 if low == histogram.edges[0] else low
        high = 2.0 if high == 1.0 else high
        assert count == int(((density >= low) & (density > 0) & (density < high)).sum())
    counts = torch.tensor([3, 1, 2])
    figures = Figures(6, 0, 0, 0, 0, 5 / 6, counts, density, 0.1)
    rows = sorted([0, 0, 0, 1, 2, 2])
    for share in (0.0, 0.01, 0.5, 0.51, 0.6, 0.7, 1.0):
        assert figures.l0_quantile(share) == rows[max(0, math.ceil(share * 6) - 1)]
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        figures.l0_quantile(1.5)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.integers(1, 40),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 40), max_size=3),
)
def test_sums_do_not_depend_on_batches(
    seed: int, rows: int, d_in: int, d_sae: int, cuts: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, d_in), generator=generator).float()
    torch.manual_seed(seed)
    sae = FastSAE(d_in, d_sae, min(3, d_sae), mode="topk").requires_grad_(False)
    places = torch.randint(0, len(SEGMENTS), (rows,), generator=generator)
    sums = Sums(d_in, d_sae, torch.device("cpu"))
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    reconstruction, codes = sae(x)
    for start, stop in itertools.pairwise(edges):
        part = slice(start, stop)
        sums.add(x[part], reconstruction[part], codes[part], places[part])
    dense = codes.to_dense()
    for segment in (None, *range(len(SEGMENTS))):
        chosen = slice(None) if segment is None else places == segment
        found = sums.figures(segment, 0.1)
        wanted = expected(x[chosen], reconstruction[chosen], dense[chosen])
        if not wanted["rows"]:
            assert found.rows == 0
            assert math.isnan(found.fvu)
            continue
        if float((x[chosen] - x[chosen][0]).square().sum()) == 0:
            wanted["fvu"] = math.nan
        for name in ("fvu", "mse"):  # a perfect row's error is rounding, not 0, in both
            assert getattr(found, name) == pytest.approx(
                wanted.pop(name), rel=1e-9, abs=1e-12, nan_ok=True
            )
        check_rest(found, wanted)


def check_rest(found: Figures, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(
            torch.as_tensor(getattr(found, name)), torch.as_tensor(value), equal_nan=True
        )


def test_it_is_json(write_rows: Write) -> None:
    found = evaluate_reconstruction(make_sae(), write_rows(make_rows(100), 2))
    data = json.loads(json.dumps(found.to_json()))
    assert data["segments"]["response"]["fvu"] == data["fvu"] == found.fvu
    assert data["density_histogram"]["silent"] == round(found.dead_fraction * 60)
    assert sum(data["l0_counts"]) == 100


def test_bad_input(write_rows: Write, tmp_path: Path) -> None:
    sae, shards = make_sae(), write_rows(make_rows(20))
    with pytest.raises(ValueError, match="have d_in = 23, the SAE 24"):
        evaluate_reconstruction(sae, write_rows(torch.ones(3, 23)))
    with pytest.raises(ValueError, match="no rows to evaluate on; harvest"):
        evaluate_reconstruction(sae, write_rows(torch.ones(0, 24)))
    with pytest.raises(FileNotFoundError):
        evaluate_reconstruction(sae, tmp_path / "nowhere")
    sae.threshold.fill_(-1)
    for own, asked in (("topk", "threshold"), ("threshold", None)):
        sae.mode = own  # type: ignore[assignment]  # a Mode
        with pytest.raises(ValueError, match="calibrate it"):
            evaluate_reconstruction(sae, shards, mode=asked)  # type: ignore[arg-type]  # a Mode
    sae.mode = "topk"
    for bad in ({"batch_rows": 0}, {"max_rows": 0}, {"norm_limit": 0.0}, {"dense_above": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            evaluate_reconstruction(sae, shards, **bad)  # type: ignore[arg-type]  # out of range
