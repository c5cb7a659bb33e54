"""decoder_similarity(): against the dense matrix of cosines."""

from __future__ import annotations

import math

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.evals import decoder, decoder_similarity


def make_sae(d_sae: int = 70, d_in: int = 12) -> FastSAE:
    torch.manual_seed(0)
    sae = FastSAE(d_in, d_sae, 1).requires_grad_(False)
    sae.W_dec.mul_(torch.rand(d_sae, 1) * 50 + 0.01)
    return sae


@pytest.mark.parametrize("numbers", [1 << 23, 12 * 7])
def test_all_features(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(decoder, "_BLOCK_NUMBERS", numbers)
    sae = make_sae()
    sae.W_dec[11] = 3 * sae.W_dec[4]  # the same direction
    sae.W_dec[30] = -sae.W_dec[31]  # the opposite one is not near
    sae.W_dec[[5, 69]] = 0
    found = decoder_similarity(sae)
    unit = torch.nn.functional.normalize(sae.W_dec.double(), dim=1)
    there = [f for f in range(70) if f not in (5, 69)]
    cosines = (unit @ unit.T)[there][:, there].fill_diagonal_(-2)
    assert found.features.tolist() == there
    assert found.zero == 2
    torch.testing.assert_close(found.nearest.double(), cosines.amax(1), rtol=1e-5, atol=1e-5)
    assert found.nearest[there.index(4)] == pytest.approx(1.0, abs=1e-5)
    assert found.alike_fraction == pytest.approx(float((cosines.amax(1) > 0.9).double().mean()))
    values = sorted(found.nearest.tolist())
    for share in (0.0, 0.3, 0.5, 1.0):
        assert found.quantile(share) == values[max(0, math.ceil(share * 68) - 1)]


def test_a_sample_is_compared_with_all() -> None:
    sae = make_sae()
    whole, some = decoder_similarity(sae), decoder_similarity(sae, max_features=9, seed=4)
    assert len(some.features) == 9
    torch.testing.assert_close(some.nearest, whole.nearest[some.features])
    assert not torch.equal(some.features, decoder_similarity(sae, max_features=9).features)


@pytest.mark.parametrize("d_sae", [1, 2])
def test_no_other_direction(d_sae: int) -> None:
    sae = make_sae(d_sae)
    sae.W_dec[1:] = 0
    found = decoder_similarity(sae)
    assert len(found.nearest) == 0
    assert found.zero == d_sae - 1
    assert math.isnan(found.mean)
    assert math.isnan(found.quantile(0.5))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="max_features is 0"):
        decoder_similarity(make_sae(), max_features=0)
