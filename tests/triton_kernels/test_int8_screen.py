"""Screened codes are those of float64 sums, rounded once: on every row, to the index."""

from __future__ import annotations

import pytest
import torch

from r1sae_fast.ops.topk import topk_reference
from r1sae_fast.triton_kernels import int8_screen
from r1sae_fast.triton_kernels.int8_screen import (
    int8_screen_topk,
    int8_screen_traffic,
    screened_weights,
)


def reference(
    x: torch.Tensor, weight: torch.Tensor, b_enc: torch.Tensor, k: int
) -> tuple[torch.Tensor, ...]:
    pre = (x.double() @ weight.double().T).float() + b_enc
    return topk_reference(pre, k, False)


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


@pytest.mark.parametrize(
    "kind",
    ["random", "outliers", "zero", "tiny", "huge", "one dimension", "same features", "near ties"],
)
@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(63, 100, 9), (40, 33, 33)])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_is_float64_to_the_index(
    kind: str, d_in: int, d_sae: int, k: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = rows_of(kind, d_in)
    weight = torch.randn(d_sae, d_in, generator=generator)
    b_enc = torch.randn(d_sae, generator=generator) * float(x.abs().max())
    if kind == "same features":
        weight[:] = weight[0]
        b_enc[:] = 0
    elif kind == "near ties":
        weight[:] = weight[0] + torch.randn(d_sae, d_in, generator=generator) * 1e-6
    weights = screened_weights(weight.to(device), b_enc.to(device))
    found, computed = int8_screen_topk(x.to(device), weights, k)
    for mine, theirs in zip(found, reference(x, weight, b_enc, k), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert computed <= x.shape[0] * d_sae


def test_it_screens(device: torch.device) -> None:
    """Heavy-tailed features, as trained ones: few candidates are left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, generator=generator)
    weight = torch.randn(128, 256, generator=generator) * 0.05
    weight[:4] = x * 0.2
    weights = screened_weights(weight.to(device))
    found, computed = int8_screen_topk(x.to(device), weights, 1)
    for mine, theirs in zip(found, reference(x, weight, torch.zeros(128), 1), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert computed < 4 * 16


def test_a_broken_certificate_is_seen(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_screen, "CERTAINTY", 0.0)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 64, generator=generator), torch.randn(96, 64, generator=generator)
    called = []
    plain = int8_screen._all_exact
    monkeypatch.setattr(int8_screen, "_all_exact", lambda *given: called.append(1) or plain(*given))
    weights = screened_weights(weight.to(device))
    found, _ = int8_screen_topk(x.to(device), weights, 5)
    assert called
    for mine, theirs in zip(found, reference(x, weight, torch.zeros(96), 5), strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.usefixtures("guarded", "grid_order")
def test_several_chunks_write_all_and_nothing_else(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_screen, "CHUNK", 2)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(96, 64, generator=generator)
    weights = screened_weights(weight.to(device))
    found, _ = int8_screen_topk(x.to(device), weights, 5)
    for mine, theirs in zip(found, reference(x, weight, torch.zeros(96), 5), strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_nothing_to_do(device: torch.device) -> None:
    weights = screened_weights(torch.ones(8, 16, device=device))
    for rows, k in ((0, 3), (2, 0)):
        (values, indices, offsets), computed = int8_screen_topk(
            torch.ones(rows, 16, device=device), weights, k
        )
        assert (values.numel(), indices.numel(), computed) == (0, 0, 0)
        assert offsets.tolist() == [0] * (rows + 1)
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        screened_weights(torch.ones(8, 16, dtype=torch.bfloat16))


def test_traffic() -> None:
    bounds, exact = int8_screen_traffic(4096, 7168, 28672, 64)
    assert bounds.scratch < 1.1 * 1024 * 28672 * 4
    assert (bounds + exact).hbm < 8 * 28672 * 7168 * 4
    assert exact.flops < bounds.flops / 50
