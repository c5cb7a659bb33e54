"""Screened codes are those of float64 sums, rounded once: on every row, to the index."""

from __future__ import annotations

import pytest
import torch

from r1sae_fast.ops.batch_topk import batch_topk_reference
from r1sae_fast.ops.threshold import threshold_reference
from r1sae_fast.ops.topk import topk_reference
from r1sae_fast.triton_kernels import int8_encode, int8_screen
from r1sae_fast.triton_kernels.int8_encode import (
    Screened,
    int8_batch_topk,
    int8_threshold,
    int8_topk,
)
from r1sae_fast.triton_kernels.int8_screen import (
    ScreenedWeights,
    int8_screen_traffic,
    screened_weights,
)

RULES = ["topk", "batch_topk", "threshold"]


def encode(rule: str, x: torch.Tensor, weights: ScreenedWeights, k: int) -> Screened:
    if rule == "threshold":
        bounds = thresholds(weights.exact.shape[0], float(k)).to(x.device)
        return int8_threshold(x, weights, bounds)
    return (int8_topk if rule == "topk" else int8_batch_topk)(x, weights, k)


def thresholds(d_sae: int, least: float) -> torch.Tensor:
    """One for all where ``least`` is odd, else one a feature."""
    if least % 2:
        return torch.tensor([least])
    return torch.linspace(least / 2, least, d_sae)


def reference(
    rule: str, x: torch.Tensor, weight: torch.Tensor, b_enc: torch.Tensor, k: int
) -> tuple[torch.Tensor, ...]:
    pre = (x.double() @ weight.double().T).float() + b_enc
    if rule == "threshold":
        return threshold_reference(pre, thresholds(weight.shape[0], float(k)), False)
    return (topk_reference if rule == "topk" else batch_topk_reference)(pre, k, False)


def check(
    rule: str, x: torch.Tensor, weight: torch.Tensor, b_enc: torch.Tensor | None, k: int
) -> Screened:
    weights = screened_weights(weight, b_enc)
    found = encode(rule, x, weights, k)
    bias = torch.zeros(weight.shape[0]) if b_enc is None else b_enc.cpu()
    expected = reference(rule, x.cpu(), weight.cpu(), bias, k)
    for mine, theirs in zip(found.codes, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    return found


def rows_of(kind: str, d_in: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, d_in, generator=generator)
    if kind == "outliers":
        x[:, :3] *= 1000
    elif kind == "zero":
        x[::2] = 0
    elif kind == "tiny":
        x *= 1e-38
    elif kind == "huge":
        x *= 1e30
    elif kind == "one dimension":
        x[:, 1:] = 0
    return x


SHAPES = {"topk": (40, 70, 9), "batch_topk": (40, 70, 9), "threshold": (9, 40, 2)}
KINDS = [
    "random",
    "outliers",
    "zero",
    "tiny",
    "huge",
    "one dimension",
    "same features",
    "near ties",
]


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        *(("topk", kind) for kind in KINDS),
        *(("batch_topk", kind) for kind in ("zero", "same features")),
        *(("threshold", kind) for kind in ("tiny", "one dimension")),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_is_float64_to_the_index(rule: str, kind: str, device: torch.device) -> None:
    d_in, d_sae, k = SHAPES[rule]
    generator = torch.Generator().manual_seed(0)
    x = rows_of(kind, d_in)
    weight = torch.randn(d_sae, d_in, generator=generator)
    b_enc = torch.randn(d_sae, generator=generator) * float(x.abs().max())
    if kind == "same features":
        weight[:] = weight[0]
        b_enc[:] = 0
    elif kind == "near ties":
        weight[:] = weight[0] + torch.randn(d_sae, d_in, generator=generator) * 1e-6
    found = check(rule, x.to(device), weight.to(device), b_enc.to(device), k)
    assert (found.exact_rows, found.violations) == (0, 0)
    assert found.candidates <= x.shape[0] * (d_sae + k)


def test_all_features_of_a_row(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 20, generator=generator), torch.randn(33, 20, generator=generator)
    check("topk", x.to(device), weight.to(device), None, 33)


@pytest.mark.parametrize(("rule", "k"), [("topk", 1), ("batch_topk", 1), ("threshold", 15)])
def test_it_screens(rule: str, k: int, device: torch.device) -> None:
    """Heavy-tailed features, as trained ones: few candidates are left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 128, generator=generator)
    weight = torch.randn(64, 128, generator=generator) * 0.05
    weight[:4] = x * 0.2
    found = check(rule, x.to(device), weight.to(device), None, k)
    assert 0 < found.candidates < 4 * 8


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_certificate_is_seen(
    rule: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_screen, "CERTAINTY", 0.0)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 32, generator=generator), torch.randn(50, 32, generator=generator)
    found = check(rule, x.to(device), weight.to(device), None, 5)
    assert found.violations > 0
    assert found.exact_rows == 3


def test_lower_bounds_that_lie_are_seen(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too high a floor would drop codes in silence: fewer than k values reach it."""
    plain = int8_encode.row_bounds
    monkeypatch.setattr(int8_encode, "row_bounds", lambda *given: plain(*given) + 100)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 32, generator=generator), torch.randn(50, 32, generator=generator)
    assert check("topk", x.to(device), weight.to(device), None, 5).violations > 0


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow encountered")
@pytest.mark.parametrize(
    ("rule", "bad"),
    [("topk", torch.nan), ("batch_topk", torch.inf), ("threshold", 3e38), ("topk", 3e38)],
)
def test_rows_without_bounds_are_computed_whole(
    rule: str, bad: float, device: torch.device
) -> None:
    """NaN is never a code, an infinity is the strongest; finite numbers may overflow too."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 64, generator=generator), torch.randn(50, 64, generator=generator)
    x[1, 5] = bad
    found = check(rule, x.to(device), weight.to(device), None, 5)
    assert found.exact_rows == 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("guarded")
def test_several_chunks_write_all_and_nothing_else(
    rule: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1sae_fast.triton_kernels.encode_gemm.CHUNK", 2)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 40, generator=generator), torch.randn(70, 40, generator=generator)
    assert check(rule, x.to(device), weight.to(device), None, 5).exact_rows == 0


@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_do(rule: str, device: torch.device) -> None:
    weights = screened_weights(torch.ones(8, 16, device=device))
    for rows, k in ((0, 3), (2, 0)):
        x = -torch.ones(rows, 16, device=device)
        found = encode(rule, x, weights, k)
        values, indices, offsets = found.codes
        assert (values.numel(), indices.numel(), found.candidates) == (0, 0, 0)
        assert offsets.tolist() == [0] * (rows + 1)
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        screened_weights(torch.ones(8, 16, dtype=torch.bfloat16))


def test_traffic() -> None:
    bounds, exact = int8_screen_traffic(4096, 7168, 28672, 64)
    assert bounds.scratch < 1.1 * 1024 * 28672 * 4
    assert (bounds + exact).hbm < 8 * 28672 * 7168 * 4
    assert exact.flops < bounds.flops / 50
