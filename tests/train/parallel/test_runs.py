"""Runs of many processes: one ordinary checkpoint, other numbers of ranks, signals, lost ranks."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

CONFIG = TrainConfig(
    d_sae=45, k=3, tokens=60 * 50, batch_size=50, learning_rate=1e-3, dead_after_tokens=400
)

# Each run stops, in all ranks, by an exception at the line of a step that is told.
PROGRAM = r"""
import os, signal, sys
from r1sae_fast.errors import LostRankError
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.parallel.run import train_in_parallel

shards, out, config, layouts, at, what, of_rank = [eval(text) for text in arguments]
expected = None if what == "SIGKILL" else 143 if what == "SIGTERM" else 0
acts = ActivationShards(shards)

class StoppedError(Exception):
    pass

def work(layout, rank, known):
    stop = at[layouts.index((layout.data, layout.latents))]
    def on_metrics(line):
        if stop and line.step >= stop:
            if not what:
                raise StoppedError
            if rank == of_rank:
                os.kill(os.getpid(), getattr(signal, what))
    try:
        sae = train_in_parallel(
            acts, out, config, layout, log_every=7, checkpoint_seconds=0, progress=False,
            on_metrics=on_metrics,
        )
        assert (sae is None) == (rank > 0)
    except StoppedError:
        assert stop
    except LostRankError as error:
        print(error, file=sys.stderr)
        sys.exit(75)
"""


def program(
    acts: ActivationShards,
    out: Path,
    config: TrainConfig,
    layouts: list[tuple[int, int]],
    at: list[int],
    what: str = "",
    of_rank: int = 1,
) -> tuple[str, ...]:
    return tuple(map(repr, (str(acts.folder), str(out), config, layouts, at, what, of_rank)))


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        header = json.loads(file.metadata()["r1sae_train"])
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def require_same(one: Path, many: Path) -> None:
    """Checkpoints, SAEs and lines of metrics are the same but for the order of sums."""
    expected, header = contents(one)
    found, found_header = contents(many)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # A last bit may move a code over its edge, and with it a few features' weights.
        close = (found[name].double() - tensor.double()).abs() <= 1e-5
        assert close.double().mean() >= 0.8, name
    for name in ("identity", "loader", "format", "version"):
        assert header[name] == found_header[name], name
    for name in ("step", "tokens", "left_out"):
        assert header["counters"][name] == found_header["counters"][name], name
    assert header["counters"]["l0"] == pytest.approx(found_header["counters"]["l0"], rel=0.01)
    state = FastSAE.load(many).state_dict()
    for name, tensor in FastSAE.load(one).state_dict().items():
        assert (state[name] - tensor).norm() <= 0.02 * tensor.norm() + 1e-4, name
    steps = [
        [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, many)
    ]
    assert steps[0] == steps[1]
    assert not list(many.glob("*.tmp"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # More processes than a batch has rows.
        {"k": None, "mode": "jumprelu", "sparsity_loss": "l0", "tied": True}
        | {"batch_size": 3, "tokens": 180},
    ],
    ids=["batch_topk", "jumprelu-tied-of-three-rows"],
)
def test_a_run_goes_on_in_any_number_of_processes(
    acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks, changes: dict[str, object]
) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]  # of several types
    train(acts, tmp_path / "one", config, log_every=7, progress=False)
    stages = [(1, 2), (2, 1), (2, 2)]
    many = tmp_path / "many"
    result = run_ranks(PROGRAM, *program(acts, many, config, stages, [14, 28, 0]))
    assert result.returncode == 0, result.stderr
    require_same(tmp_path / "one", many)


def test_a_rank_that_is_told_to_stop_ends_all(
    acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks
) -> None:
    many = tmp_path / "many"
    stopped = program(acts, many, CONFIG, [(1, 2)], [7], "SIGTERM")
    result = run_ranks(PROGRAM, *stopped)
    assert result.returncode == 0, result.stderr
    assert "statuses 143 143" in result.stdout
    assert result.stderr.count("saved at step 8 of 60") == 1
    assert contents(many)[1]["counters"]["step"] == 8  # type: ignore[index]
    train(acts, many, CONFIG, log_every=7, progress=False)
    assert contents(many)[1]["counters"]["step"] == 60  # type: ignore[index]


def test_a_lost_rank_ends_all(acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks) -> None:
    rank = 0  # the one that writes
    train(acts, tmp_path / "one", CONFIG, log_every=7, progress=False)
    many = tmp_path / "many"
    killed = program(acts, many, CONFIG, [(1, 2)], [21], "SIGKILL", rank)
    result = run_ranks(PROGRAM, *killed)
    statuses = {rank: -9, 1 - rank: 75}
    assert f"statuses {statuses[0]} {statuses[1]}" in result.stdout, result.stderr
    assert f"rank {1 - rank} lost one of the ranks [0, 1]" in result.stderr
    assert contents(many)[1]["counters"]["step"] == 14  # type: ignore[index]
    train(acts, many, CONFIG, log_every=7, progress=False)
    require_same(tmp_path / "one", many)
