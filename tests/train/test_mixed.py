"""Steps computed with weights in bfloat16 beside float32 ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.optim import FactoredGradient
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import Metrics, TrainConfig, train
from r1sae_fast.train.step import Learner

CPU = torch.device("cpu")
D_IN, D_SAE = 63, 123
MODES: list[dict[str, Any]] = [
    {"mode": "topk", "k": 3},
    {"mode": "batch_topk", "k": 3},
    {"mode": "batch_topk", "k": 3, "tied": True},
    {"mode": "matryoshka", "k": 3},
    {"mode": "jumprelu", "k": 3},
    {"mode": "relu"},
]


def learner(dtype: str, weights: dict[str, Tensor] | None, **settings: Any) -> Learner:
    made = Learner(TrainConfig(D_SAE, compute_dtype=dtype, **settings), D_IN, CPU)
    for name, tensor in (weights or {}).items():
        made.parameters[name].copy_(tensor)
    made.weights_changed(None, None)
    return made


def written_out(gradient: Tensor | FactoredGradient) -> Tensor:
    return gradient.to_dense() if isinstance(gradient, FactoredGradient) else gradient


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_gradients_are_those_at_the_rounded_weights(settings: dict[str, Any]) -> None:
    """Where no pre-activation loses a bit: of few whole numbers in quarters."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    # Seven dimensions of each row are in use: sums of quarters up to 7, 6 bits with the sign.
    x = torch.where(torch.rand(40, D_IN, generator=generator) < 7 / D_IN, whole(40, D_IN).sign(), 0)
    kept = x.abs().cumsum(1) <= 7
    x = x * kept
    weights = {"encoder": whole(D_SAE, D_IN) / 4, "b_enc": torch.zeros(D_SAE)}
    # Of far more bits than bfloat16 has.
    weights["decoder"] = torch.randn(D_SAE, D_IN, generator=generator)
    if settings.get("tied"):
        del weights["decoder"]
    mine = learner("bfloat16", weights, **settings)
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    exact = learner("float32", rounded, **settings)
    for one in (mine, exact):
        # Few codes, so that none of them is found by dense products, which read the masters.
        one.found = 0.0
        if "log_threshold" in one.parameters:
            one.parameters["log_threshold"].fill_(1.0)
    if settings["mode"] == "relu":
        # As many as relu begins with are summed by dense products.
        for one in (mine, exact):
            one.parameters["b_enc"].fill_(-4.0)
            one.weights_changed(None, None)
    figures, found = mine.gradients(x)
    expected_figures, expected = exact.gradients(x)
    assert figures.l0 == expected_figures.l0 > 0
    torch.testing.assert_close(figures.loss, expected_figures.loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        dense = written_out(gradient)
        # Sums of at most 40 terms in another order.
        torch.testing.assert_close(
            written_out(found[name]), dense, rtol=1e-4, atol=1e-5 * float(dense.abs().max()) + 1e-12
        )


def test_codes_are_those_of_an_sae_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(1)
    mine = learner("bfloat16", None, mode="batch_topk", k=5)
    for tensor in mine.parameters.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    mine.weights_changed(None, None)
    sae = FastSAE(D_IN, D_SAE, 5, "batch_topk", tied=False, dtype=torch.bfloat16)
    with torch.no_grad():
        sae.W_enc.copy_(mine.parameters["encoder"].T)
        sae.b_enc.copy_(mine.parameters["b_enc"])
    x = torch.randn(30, D_IN, generator=generator)
    found = mine.sae().find.batch_topk(x, 5, check_finite=True)
    expected = sae.encode_sparse(x.bfloat16())
    assert found.values.dtype == torch.float32
    assert torch.equal(found.values, expected.values.float())
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("adam", ["dense", "sparse"])
def test_small_steps_add_up_and_copies_follow(settings: dict[str, Any], adam: str) -> None:
    mine = learner("bfloat16", None, adam=adam, aux_k=4, dead_after_tokens=20, **settings)
    first = {name: tensor.clone() for name, tensor in mine.parameters.items()}
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, D_IN, generator=generator)
    mine.start(x)
    for _ in range(12):
        # Less than half of the last bit of nearly all weights.
        figures = mine.step(x, 1e-6)
        assert bool(figures.loss.isfinite())
        assert mine.rounded is not None
        for name, copy in (("encoder", mine.rounded.encoder), ("decoder", mine.rounded.decoder)):
            assert torch.equal(copy, mine.parameters.get(name, mine.decoder).bfloat16())
        assert torch.equal(mine.rounded.b_enc, mine.parameters["b_enc"].bfloat16())
    moved = mine.parameters["encoder"] != first["encoder"]
    assert moved.any()
    assert not torch.equal(
        mine.parameters["encoder"], mine.parameters["encoder"].bfloat16().float()
    )


def test_a_run_goes_on_to_the_bit(shards: ActivationShards, tmp_path: Path) -> None:
    config = TrainConfig(64, 3, tokens=64 * 40, batch_size=64, compute_dtype="bfloat16", aux_k=4)
    whole = train(shards, tmp_path / "a", config, progress=False)

    class StopError(Exception):
        pass

    def stop(line: Metrics) -> None:
        if line.step == 21:
            raise StopError

    with pytest.raises(StopError):
        train(
            shards, tmp_path / "b", config, progress=False, log_every=7, checkpoint_seconds=0.0,
            on_metrics=stop,
        )  # fmt: skip
    resumed = train(shards, tmp_path / "b", config, progress=False)
    for name, tensor in whole.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    plain = train(
        shards, tmp_path / "c", TrainConfig(64, 3, tokens=64 * 40, batch_size=64, aux_k=4),
        progress=False,
    )  # fmt: skip
    assert not torch.equal(plain.W_dec, whole.W_dec)
    with pytest.raises(ValueError, match="compute_dtype"):
        train(shards, tmp_path / "c", config, progress=False)


def test_other_dtypes_and_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="compute_dtype is 'float16'"):
        TrainConfig(8, 2, compute_dtype="float16")
    config = TrainConfig(8, 2, compute_dtype="bfloat16")
    with pytest.raises(ValueError, match='compute_dtype is "bfloat16" on cpu'):
        Learner(config, 4, CPU, in_factors=False)
