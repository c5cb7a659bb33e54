"""Transcoders: gradients of the definition, runs from pairs of shards, files, evaluation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from r1sae_fast import FastSAE
from r1sae_fast.cli.main import app
from r1sae_fast.errors import CheckpointError, NonFiniteError, ShardError
from r1sae_fast.evals import evaluate_reconstruction
from r1sae_fast.optim import FactoredGradient
from r1sae_fast.sae import SaeConfig
from r1sae_fast.shards import ActivationShards, ActivationWriter, PairedShards
from r1sae_fast.train import TrainConfig, read_train_file, train
from r1sae_fast.train.losses import LOSSES
from r1sae_fast.train.resample import resample
from r1sae_fast.train.run import Run
from r1sae_fast.train.step import Learner

CPU = torch.device("cpu")
D_IN = 24
CONFIG = TrainConfig(
    d_sae=64, k=4, tokens=30_000, batch_size=500, learning_rate=1e-2, dead_after_tokens=2_000
)
WAYS: dict[str, dict[str, Any]] = {
    "torch": {"in_factors": False, "by_kernels": False},
    "kernels": {"in_factors": False, "by_kernels": True},
    "factors": {"in_factors": True},
}
MODES: list[dict[str, Any]] = [
    {"mode": "topk", "k": 3},
    {"mode": "batch_topk", "k": 3},
    {"mode": "matryoshka", "k": 3},
    {"mode": "jumprelu", "k": 3, "bandwidth": 0.4},
    {"mode": "relu", "sparsity_coefficient": 0.5},
]


@pytest.fixture
def features() -> Callable[[int], Tensor]:
    """Strengths of 32 features, about two a row."""

    def make(rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        on = torch.rand(rows, 32, generator=generator) < 2 / 32
        return on * (1 + torch.rand(rows, 32, generator=generator))

    return make


def directions(seed: int) -> Tensor:
    return F.normalize(torch.randn(32, D_IN, generator=torch.Generator().manual_seed(seed)), dim=1)


def write(folder: Path, rows: Tensor, first_token: int = 0) -> ActivationShards:
    with ActivationWriter(folder, rows.shape[1], dtype="float32", rows_per_shard=3000) as writer:
        number = torch.arange(len(rows))
        writer.write(
            rows, tokens=number + first_token, sequence_id=number // 100, position=number % 100
        )
    return ActivationShards(folder)


@pytest.fixture
def pairs(tmp_path: Path, features: Callable[[int], Tensor]) -> PairedShards:
    """The same features in other directions, far from the origin and 50 times as long."""
    strengths = features(8000)
    reads = write(tmp_path / "reads", strengths @ directions(1) + 3.0)
    makes = write(tmp_path / "makes", 50.0 * (strengths @ directions(2)) - 20.0)
    return PairedShards(reads, makes.folder)


@pytest.mark.parametrize("way", WAYS)
@given(
    skip=st.booleans(),
    settings=st.sampled_from(MODES),
    rows=st.integers(1, 40),
    d_in=st.sampled_from([1, 5, 63]),
    seed=st.integers(0, 2**32),
)
def test_gradients_are_those_of_the_definition(
    way: str, skip: bool, settings: dict[str, Any], rows: int, d_in: int, seed: int
) -> None:
    config = TrainConfig(d_sae=63, skip_connection=skip, aux_coefficient=0.0, **settings)
    mine = Learner(config, d_in, CPU, transcodes=True, **WAYS[way])
    generator = torch.Generator().manual_seed(seed)
    for tensor in mine.parameters.values():
        tensor.copy_(torch.randint(-8, 9, tensor.shape, generator=generator) / 8)
    # Products of such numbers are exact, in whatever order they are added up: no pre-activation is
    # on the one side of an edge here and on the other there.
    x, y = torch.randint(-8, 9, (2, rows, d_in), generator=generator) / 8
    weights = {name: tensor.clone().requires_grad_() for name, tensor in mine.parameters.items()}
    defined = LOSSES[config.mode].definition(weights, x, config, 0.75, y)
    defined.loss.backward()
    figures, found = mine.gradients(x, 0.75, y)
    torch.testing.assert_close(figures.loss, defined.loss.detach(), rtol=1e-5, atol=1e-7)
    assert ("skip" in found) == skip
    for name, gradient in found.items():
        written = gradient.to_dense() if isinstance(gradient, FactoredGradient) else gradient
        expected = weights[name].grad
        expected = torch.zeros_like(written) if expected is None else expected
        torch.testing.assert_close(
            written, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()) + 1e-9, msg=name
        )


@pytest.mark.parametrize("mode", ["batch_topk", "jumprelu"])
def test_it_learns_what_to_make(pairs: PairedShards, tmp_path: Path, mode: str) -> None:
    config = replace(CONFIG, mode=mode, tokens=60_000)
    sae = train(pairs, tmp_path / "out", config, progress=False)
    assert sae.transcoder
    assert sae.W_skip is None
    found = evaluate_reconstruction(sae, pairs, mode="threshold")
    assert found.fvu < 0.25
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=1e-4, atol=1e-4)
    # Codes are strengths, in the units of what is made.
    codes = sae.encode_sparse(pairs.inputs[:500].activations)
    assert 30 < float(codes.values.detach().max()) < 300
    assert sae.metadata["targets_fingerprint"] == pairs.targets.fingerprint
    loaded = FastSAE.load(tmp_path / "out")
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_skip_connection_makes_what_is_linear(
    tmp_path: Path, features: Callable[[int], Tensor]
) -> None:
    x = features(4000) @ directions(1) + 3.0
    matrix = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(0))
    pairs = PairedShards(write(tmp_path / "x", x), write(tmp_path / "y", 10.0 * x @ matrix.T + 7.0))
    config = replace(CONFIG, k=1, skip_connection=True)
    with_skip = train(pairs, tmp_path / "skip", config, progress=False)
    without = train(pairs, tmp_path / "plain", replace(config, skip_connection=False),
                    progress=False)  # fmt: skip
    fvu = evaluate_reconstruction(with_skip, pairs).fvu
    assert fvu < 0.06
    assert fvu < 0.2 * evaluate_reconstruction(without, pairs).fvu
    assert with_skip.W_skip is not None
    loaded = FastSAE.load(tmp_path / "skip")
    rows = pairs.inputs[:50].activations
    assert torch.equal(loaded(rows)[0], with_skip(rows)[0])


@pytest.mark.parametrize("skip", [False, True])
def test_standardisation_is_folded_in(pairs: PairedShards, tmp_path: Path, skip: bool) -> None:
    """What the saved one makes of raw rows is what was trained makes of standardised ones."""
    config = replace(CONFIG, mode="topk", tokens=5_000, skip_connection=skip)
    run = Run(pairs, tmp_path, config, CPU, resume=True)
    run.go(checkpoint_seconds=60, log_every=10, progress=False, on_metrics=None)
    rows = next(iter(pairs.loader(200, shuffle=False)))
    x, target, left_out = run.standardisation.apply(rows, CPU)
    assert target is not None
    assert left_out == 0
    with torch.no_grad():
        found = LOSSES["topk"].forward(run.learner.sae(), x, config, 1.0, target)
        made, codes = run.sae()(rows.activations)
    aim = run.standardisation.target
    assert aim is not None
    expected = (target + found.error) / aim.scale + aim.centre
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(
        codes.to_dense() * aim.scale, found.fired.to_dense(), rtol=1e-3, atol=1e-3
    )


def test_a_stopped_run_goes_on_to_the_bit(pairs: PairedShards, tmp_path: Path) -> None:
    config = replace(CONFIG, skip_connection=True, tokens=10_000, resample_every=4_000)
    whole = train(pairs, tmp_path / "a", config, progress=False, log_every=3)

    def stop(line: object) -> None:
        if line.step == 9:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pairs, tmp_path / "b", config, progress=False, log_every=3, checkpoint_seconds=0,
              on_metrics=stop)  # fmt: skip
    again = train(pairs, tmp_path / "b", config, progress=False, log_every=3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="started with shards = "):
        train(pairs.inputs, tmp_path / "b", replace(config, skip_connection=False), progress=False)


def test_dead_features_read_a_row_and_make_what_is_missing(pairs: PairedShards) -> None:
    learner = Learner(CONFIG, D_IN, CPU, transcodes=True)
    x, y = torch.randn(2, 300, D_IN, generator=torch.Generator().manual_seed(0))
    learner.unfired_tokens[[3, 40]] = 5000
    with torch.no_grad():
        error = LOSSES["batch_topk"].forward(learner.sae(), x, CONFIG, 1.0, y).error
        assert resample(learner, x, 1, y) == 2
    for feature in (3, 40):
        likeness = F.normalize(x, dim=1) @ F.normalize(
            learner.parameters["encoder"][feature], dim=0
        )
        row = int(likeness.argmax())
        assert float(likeness[row]) > 0.9999
        made = F.normalize(-error[row], dim=0) @ learner.decoder[feature]
        assert float(made) == pytest.approx(1.0, abs=1e-5)


# -- what is refused ------------------------------------------------------------------------------


def test_shards_that_are_no_pair(pairs: PairedShards, tmp_path: Path) -> None:
    rows = torch.randn(8000, D_IN)
    with pytest.raises(ValueError, match=r"has 7,999 rows, .*reads 8,000; expected as many"):
        PairedShards(pairs.inputs, write(tmp_path / "short", rows[1:]))
    with pytest.raises(ValueError, match=r"numbers a row"):
        PairedShards(pairs.inputs, write(tmp_path / "narrow", rows[:, 1:].contiguous()))
    other = PairedShards(pairs.inputs, write(tmp_path / "other", rows, first_token=1))
    with pytest.raises(ShardError, match=r"row \d+ has tokens \d+ in .*they are not of the same"):
        train(other, tmp_path / "out", CONFIG, progress=False)
    with ActivationWriter(tmp_path / "bad", D_IN, dtype="float32", check_finite=False) as writer:
        rows[4321, 3] = float("nan")
        writer.write(rows)
    with pytest.raises(NonFiniteError, match="targets hold a NaN"):
        train(PairedShards(pairs.inputs, tmp_path / "bad"), tmp_path / "out", CONFIG)


def test_settings_of_the_other_kind(pairs: PairedShards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="skip_connection is True without targets"):
        train(pairs.inputs, tmp_path / "out", replace(CONFIG, skip_connection=True))
    with pytest.raises(ValueError, match="tied is True with targets"):
        train(pairs, tmp_path / "out", replace(CONFIG, tied=True))
    with pytest.raises(TypeError, match="skip_connection is 'yes'; expected true or false"):
        replace(CONFIG, skip_connection="yes")  # type: ignore[arg-type]  # what is tested
    file = tmp_path / "run.toml"
    start = 'out = "sae"\nd_sae = 64\nk = 4\n'
    for text, message in [
        ('shards = "a"\ntargets = "b"\ntied = true\n', "has both tied and targets"),
        ('shards = "a"\nskip_connection = true\n', "has skip_connection without targets"),
        ('targets = "b"\n[data]\nengine = "tiny-r1"\n', r"has both targets and \[data\]"),
        ('shards = "a"\ntarget = "b"\n', "unknown key 'target'; did you mean 'targets'"),
        ('shards = "a"\ntargets = 3\n', "targets is 3; expected a folder"),
    ]:
        file.write_text(start + text)
        with pytest.raises((ValueError, TypeError), match=message):
            read_train_file(file)
    file.write_text(start + 'shards = "a"\ntargets = "b"\nskip_connection = true\n')
    assert read_train_file(file).targets == tmp_path / "b"
    with pytest.raises(ValueError, match="tied and transcoder are True"):
        SaeConfig(4, 8, 2, tied=True, transcoder=True)
    with pytest.raises(ValueError, match="expected transcoder to be True"):
        SaeConfig(4, 8, 2, skip_connection=True)


def test_files_of_autoencoders_are_as_they_were(tmp_path: Path) -> None:
    """So that earlier releases read them; a transcoder's they refuse by its version."""
    FastSAE(4, 8, 2).save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert config["version"] == 1
    assert "transcoder" not in config
    FastSAE(4, 8, 2, transcoder=True, skip_connection=True).save(tmp_path / "skip")
    config = json.loads((tmp_path / "skip" / "config.json").read_text())
    assert (config["version"], config["skip_connection"]) == (2, True)
    with pytest.raises(CheckpointError, match="lacks skip_connection"):
        SaeConfig.from_json({k: v for k, v in config.items() if k != "skip_connection"}, "it")
    with pytest.raises(CheckpointError, match="version 3; this release reads versions up to 2"):
        SaeConfig.from_json(config | {"version": 3}, "it")
    sizes = SaeConfig(4, 8, 2, transcoder=True, skip_connection=True)
    tensors = (torch.zeros(8, 4), torch.zeros(8), torch.zeros(4), torch.zeros(4, 8))
    with pytest.raises(ValueError, match="W_skip is missing"):
        FastSAE.from_tensors(sizes, *tensors)
    with pytest.raises(ValueError, match=r"W_skip has shape \(4, 4\); expected none"):
        FastSAE.from_tensors(SaeConfig(4, 8, 2), *tensors, W_skip=torch.zeros(4, 4))


def test_by_command(pairs: PairedShards, tmp_path: Path) -> None:
    reads, makes, out = (str(path) for path in
                         (pairs.inputs.folder, pairs.targets.folder, tmp_path / "out"))  # fmt: skip
    file = tmp_path / "run.toml"
    file.write_text(
        'shards = "reads"\ntargets = "makes"\nout = "out"\nskip_connection = true\n'
        "d_sae = 64\nk = 4\ntokens = 20000\nbatch_size = 500\n"
    )
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 0, done.output
    assert "FVU 0." in done.output
    report = str(tmp_path / "eval.json")
    shown = ["--shards", reads, "--targets", makes, "--json", report]
    done = CliRunner().invoke(app, ["eval", out, *shown])
    assert done.exit_code == 0, done.output
    (entry,) = json.loads(Path(report).read_text())["saes"]
    assert entry["transcoder"]
    assert entry["reconstruction"]["fvu"] < 0.5
    for arguments, message in [
        ([out, "--shards", reads], "this is a transcoder"),
        ([out, "--targets", makes], "give both"),
        ([out, "--model", "tiny-r1", "--layer", "1"], "this is a transcoder"),
    ]:
        done = CliRunner().invoke(app, ["eval", *arguments])
        assert done.exit_code != 0
        assert message in " ".join(done.stderr.split())
    FastSAE(D_IN, 64, 4).save(tmp_path / "sae")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "sae"), *shown[:4]])
    assert "no transcoder; leave them out" in " ".join(done.stderr.split())
