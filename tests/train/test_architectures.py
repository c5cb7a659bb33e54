"""train() in each architecture: what it learns, what is saved, how it resumes, what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE, ops
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import Metrics, TrainConfig, evaluate, train
from r1sae_fast.train import checkpoint as checkpoints
from r1sae_fast.train.run import Run

CPU = torch.device("cpu")

# The rows' 32 features matter alike: fewer that must do alone would be mixtures of them.
ARCHITECTURES: list[dict[str, Any]] = [
    {"mode": "matryoshka", "k": 2, "matryoshka_widths": [40, 48], "topk_warmup": 0.6},
    {"mode": "jumprelu", "k": 2},
    {
        "mode": "jumprelu",
        "sparsity_loss": "tanh",
        "sparsity_coefficient": 0.02,
        "tanh_scale": 4.0,
        "sparsity_warmup": 0.05,
    },
    {"mode": "relu", "sparsity_coefficient": 0.2},
]


def config(settings: dict[str, Any], **others: Any) -> TrainConfig:
    """A short run's."""
    return TrainConfig(
        **{"d_sae": 48, "tokens": 20_000, "batch_size": 500, "learning_rate": 1e-2}
        | settings
        | others
    )


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_known_features_are_recovered(
    shards: ActivationShards,
    directions: Tensor,
    make_rows: Callable[..., Tensor],
    write_rows: Callable[[Tensor], ActivationShards],
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    sae = train(shards, tmp_path / "sae", config(settings, tokens=300_000), progress=False)
    nearest = (directions @ torch.nn.functional.normalize(sae.W_dec, dim=1).T).max(1).values
    assert int((nearest > 0.95).sum()) >= 22
    result = evaluate(sae, write_rows(make_rows(5000, 1)), progress=False)
    assert result.fvu < 0.2
    # An L1 penalty that were larger would shrink the codes that belong.
    assert 1.4 < result.l0 < (7 if settings["mode"] == "relu" else 3.5)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_an_interrupted_run_gives_the_same_weights(
    shards: ActivationShards, tmp_path: Path, settings: dict[str, Any]
) -> None:
    undisturbed = train(shards, tmp_path / "a", config(settings), progress=False, log_every=7)

    def stop(line: Metrics) -> None:
        if line.step >= 21:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(
            shards, tmp_path / "b", config(settings), progress=False, log_every=7,
            checkpoint_seconds=0, on_metrics=stop,
        )  # fmt: skip
    resumed = train(shards, tmp_path / "b", config(settings), progress=False, log_every=7)
    assert resumed.config == undisturbed.config
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_the_saved_sae_takes_raw_activations(
    shards: ActivationShards, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Its codes are those the learner finds in standardised rows."""
    sae = train(shards, tmp_path / "sae", config(settings), progress=False)
    again = FastSAE.load(tmp_path / "sae")
    assert again.config == sae.config
    assert torch.equal(again.threshold, sae.threshold)
    run = Run(shards, tmp_path / "sae", config(settings), CPU, resume=True)
    batch = shards[:300]
    x = run.standardisation.apply(batch, CPU).x
    learner, codes = run.learner, again.encode(batch.activations)
    pre = x @ learner.parameters["encoder"].T + learner.parameters["b_enc"]
    if sae.mode == "batch_topk":
        expected = ops.batch_topk(pre, 2).to_dense()
    else:
        theta = learner.parameters.get("log_threshold", torch.tensor(-torch.inf)).exp()
        assert again.threshold.shape == theta.shape
        expected = pre * (pre > theta)
    wrong = (codes * run.standardisation.scale - expected).abs() > 1e-3
    # Few are so close to the threshold that rounding decides.
    assert float(wrong.float().mean()) < 1e-3
    assert int((expected > 0).sum()) > 300
    assert sae.mode == {"matryoshka": "batch_topk"}.get(settings["mode"], "threshold")
    if "k" not in settings:
        assert sae.k == max(1, round(run.learner.l0))
        assert sae.k == pytest.approx(evaluate(sae, shards, progress=False).l0, abs=1)


def test_rows_share_their_codes_after_the_warmup(shards: ActivationShards, tmp_path: Path) -> None:
    def weights(mode: str, share: float | None) -> dict[str, Tensor]:
        settings = config({"mode": mode, "k": 2, "topk_warmup": share})
        sae = train(shards, tmp_path / f"{mode}-{share}", settings, progress=False)
        return sae.state_dict()

    topk, of_rows, half = (
        weights("topk", None), weights("batch_topk", 1.0), weights("batch_topk", 0.5)
    )  # fmt: skip
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(topk[name], of_rows[name]), name
        assert not torch.equal(topk[name], half[name]), name


def test_a_run_of_before_there_were_row_by_row_steps(
    shards: ActivationShards, tmp_path: Path
) -> None:
    old = config({"mode": "batch_topk", "k": 2}, topk_warmup=0.0)
    train(shards, tmp_path / "sae", old, progress=False)
    saved = checkpoints.Checkpoint.read(tmp_path / "sae")
    assert saved is not None
    del saved.identity["topk_warmup"]
    saved.identity["beta2"] = 0.99  # as it would be for so few steps now
    saved.write(tmp_path / "sae")
    for same in (old, replace(old, topk_warmup=None)):
        train(shards, tmp_path / "sae", same, progress=False)
    with pytest.raises(ValueError, match=r"topk_warmup = 0\.0, not 0\.5"):
        train(shards, tmp_path / "sae", replace(old, topk_warmup=0.5), progress=False)


def test_a_run_of_before_there_were_so_many_settings(
    shards: ActivationShards, tmp_path: Path
) -> None:
    old = config({"mode": "batch_topk", "k": 2})
    train(shards, tmp_path / "sae", old, progress=False)
    saved = checkpoints.Checkpoint.read(tmp_path / "sae")
    assert saved is not None
    new = {
        "matryoshka_widths", "sparsity_loss", "sparsity_coefficient", "sparsity_warmup",
        "bandwidth", "tanh_scale",
    }  # fmt: skip
    assert saved.identity.keys() > new
    saved.identity = {name: value for name, value in saved.identity.items() if name not in new}
    saved.write(tmp_path / "sae")
    train(shards, tmp_path / "sae", old, progress=False)
    with pytest.raises(ValueError, match="started with mode = 'batch_topk', not 'matryoshka'"):
        train(shards, tmp_path / "sae", replace(old, mode="matryoshka"), progress=False)


def test_the_settings_are_written_as_json(shards: ActivationShards, tmp_path: Path) -> None:
    wanted = config(ARCHITECTURES[0])
    assert wanted.matryoshka_widths == (40, 48)
    sae = train(shards, tmp_path / "sae", wanted, progress=False)
    assert json.loads(json.dumps(wanted.to_dict())) == wanted.to_dict()
    assert TrainConfig(**sae.metadata["training"]) == wanted
