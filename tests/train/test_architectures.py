"""train() in each architecture: what it learns, what is saved, how it resumes, what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import Metrics, TrainConfig, evaluate, train
from r1sae_fast.train import checkpoint as checkpoints

# The rows' 32 features matter alike: fewer that must do alone would be mixtures of them.
ARCHITECTURES: list[dict[str, Any]] = [
    {"mode": "matryoshka", "k": 2, "matryoshka_widths": [40, 48]},
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
    assert int((nearest > 0.95).sum()) >= 26
    result = evaluate(sae, write_rows(make_rows(5000, 1)), progress=False)
    assert result.fvu < 0.1
    assert result.l0 == pytest.approx(2, rel=0.2)


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
def test_the_mode_that_is_saved(
    shards: ActivationShards, tmp_path: Path, settings: dict[str, Any]
) -> None:
    sae = train(shards, tmp_path / "sae", config(settings), progress=False)
    assert sae.mode == "batch_topk"
    again = FastSAE.load(tmp_path / "sae")
    assert again.config == sae.config
    rows = shards[:300].activations
    assert torch.equal(again.encode(rows), sae.encode(rows))


def test_a_run_of_before_there_were_so_many_settings(
    shards: ActivationShards, tmp_path: Path
) -> None:
    old = config({"mode": "batch_topk", "k": 2})
    train(shards, tmp_path / "sae", old, progress=False)
    saved = checkpoints.Checkpoint.read(tmp_path / "sae")
    assert saved is not None
    new = ("matryoshka_widths",)
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
