"""Ranks that were started for different runs are told so, all of them, and none waits."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

CONFIG = TrainConfig(d_sae=45, k=3, tokens=20 * 50, batch_size=50)

# Each rank takes its own of the list.
PROGRAM = r"""
import sys
from dataclasses import replace
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.parallel.run import train_in_parallel

shards, config, layouts, folders, changes, options = [eval(text) for text in arguments]
expected = 4
acts = ActivationShards(shards)

def work(layout, rank, known):
    try:
        train_in_parallel(
            acts, folders[rank], replace(config, **changes[rank]), layout, progress=False,
            **options[rank],
        )
    except ValueError as error:
        print(f"{error}\n", end="", file=sys.stderr)
        sys.exit(4)
"""


def told(
    acts: ActivationShards,
    run_ranks: RunRanks,
    folders: list[Path],
    changes: list[dict[str, object]] | None = None,
    options: list[dict[str, object]] | None = None,
) -> str:
    """What both ranks say, which they do before anything was trained."""
    nothing: list[dict[str, object]] = [{}, {}]
    out = [str(folder) for folder in folders]
    result = run_ranks(
        PROGRAM,
        *map(repr, (str(acts.folder), CONFIG, [(1, 2)], out, changes or nothing)),
        repr(options or nothing),
    )
    assert result.returncode == 0, result.stderr
    assert "statuses 4 4" in result.stdout, result.stderr
    lines = result.stderr.splitlines()
    said = [line for line in lines if line.startswith("rank 1 has ")]
    assert len(said) == 2, result.stderr
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_one_of_them_sees_a_checkpoint(
    acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks, rank: int
) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    train(acts, folders[rank], CONFIG, progress=False)
    said = told(acts, run_ranks, folders)
    assert said.count("'none'") == 1
    assert said.startswith("rank 1 has checkpoint = " + ("'none'", "'step 20, ")[rank])
    assert "a folder on a file system that they share" in said
    assert not (folders[1 - rank] / "checkpoint.safetensors").exists()


def test_checkpoints_of_the_same_step_differ(
    acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks
) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    train(acts, folders[0], CONFIG, progress=False)
    other = TrainConfig(d_sae=45, k=4, tokens=20 * 50, batch_size=50)
    train(acts, folders[1], other, progress=False)
    assert told(acts, run_ranks, folders).count("'step 20, ") == 2


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ([{}, {"seed": 7}], [{}, {}], "rank 1 has seed = 7, rank 0 has 0"),
        ([{}, {}], [{"log_every": 3}, {"log_every": 4}], "log_every = 4, rank 0 has 3"),
    ],
    ids=["seed", "log_every"],
)
def test_other_settings(
    acts: ActivationShards,
    tmp_path: Path,
    run_ranks: RunRanks,
    changes: list[dict[str, object]],
    options: list[dict[str, object]],
    expected: str,
) -> None:
    assert expected in told(acts, run_ranks, [tmp_path / "sae"] * 2, changes, options)
    assert not (tmp_path / "sae").exists()
