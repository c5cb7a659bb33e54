"""evaluate(): its figures are those of the definitions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import evaluate


@pytest.fixture
def sae() -> FastSAE:
    torch.manual_seed(0)
    return FastSAE(24, 40, 3, mode="topk")


@pytest.mark.parametrize("batch_rows", [7, 63, 10_000])
def test_figures_are_those_of_the_definitions(
    sae: FastSAE,
    make_rows: Callable[..., Tensor],
    write_rows: Callable[[Tensor], ActivationShards],
    batch_rows: int,
) -> None:
    rows = make_rows(200)
    found = evaluate(sae, write_rows(rows), batch_rows=batch_rows, progress=False)
    with torch.no_grad():
        reconstruction, codes = sae(rows)
    error = (rows - reconstruction).double().square().sum()
    fvu = error / (rows.double() - rows.double().mean(0)).square().sum()
    dense = codes.to_dense() > 0
    assert found.fvu == pytest.approx(float(fvu), rel=1e-5)
    assert found.explained_variance == 1 - found.fvu
    assert found.l0 == pytest.approx(float(dense.sum(1).double().mean()))
    assert found.dead_fraction == pytest.approx(float((~dense.any(0)).double().mean()))
    torch.testing.assert_close(found.density, dense.double().mean(0))
    assert (found.rows, found.left_out, found.mode) == (200, 0, "topk")


def test_max_rows_and_norm_limit(
    sae: FastSAE,
    make_rows: Callable[..., Tensor],
    write_rows: Callable[[Tensor], ActivationShards],
) -> None:
    rows = make_rows(300)
    shards = write_rows(rows)
    assert evaluate(sae, shards, max_rows=100, batch_rows=64, progress=False).rows == 100
    norms = rows.norm(dim=1)
    limit = float(norms.median())
    found = evaluate(sae, shards, norm_limit=limit, progress=False)
    assert found.rows == int((norms <= limit).sum())
    assert found.left_out == 300 - found.rows


def test_bad_input(sae: FastSAE, write_rows: Callable[[Tensor], ActivationShards]) -> None:
    with pytest.raises(ValueError, match="d_in = 23, the SAE 24"):
        evaluate(sae, write_rows(torch.ones(3, 23)), progress=False)
    with pytest.raises(ValueError, match="no rows"):
        evaluate(sae, write_rows(torch.ones(0, 24)), progress=False)
