"""Started as users start it: `r1sae train --processes`, torch's own launcher underneath."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1sae_fast import FastSAE
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, read_train_file
from r1sae_fast.train.parallel import Layout

SETTINGS = """
shards = "activations"
out = "sae"
d_sae = 45
k = 3
tokens = 1000
batch_size = 50
evaluate_rows = 100
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
def test_the_command_starts_its_processes(acts: ActivationShards, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(SETTINGS + "[parallel]\ndata = 2\n")
    result = run("-m", "r1sae_fast.cli", "train", str(file))
    assert result.returncode == 0, result.stderr
    # One of them speaks.
    assert result.stdout.count("trained on") == 1
    assert result.stdout.count("FVU") == 1
    assert FastSAE.load(tmp_path / "sae").metadata["tokens"] > 900


# What each rank runs; the one that is to die does so at the line of a step.
DYING = """
import os, signal, sys
from r1sae_fast.errors import LostRankError
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.parallel.launch import LOST
from r1sae_fast.train.parallel.layout import Layout
from r1sae_fast.train.parallel.run import train_in_parallel
def die(line):
    if line.step >= 8 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
config = TrainConfig(d_sae=45, k=3, tokens=5000, batch_size=50)
try:
    train_in_parallel(
        ActivationShards(sys.argv[1]), sys.argv[2], config, Layout(latents=2), log_every=4,
        checkpoint_seconds=0, progress=False, on_metrics=die,
    )
except LostRankError:
    sys.exit(LOST)
"""
LAUNCHER = """
import sys
from r1sae_fast.errors import LostRankError
from r1sae_fast.train.parallel.launch import launch
try:
    launch(sys.argv[1:], 2)
except LostRankError as error:
    print("named:", error)
    sys.exit(3)
"""


@pytest.mark.slow
def test_the_rank_that_died_is_named(acts: ActivationShards, tmp_path: Path) -> None:
    what = ("-c", DYING, str(acts.folder), str(tmp_path / "sae"))
    result = run("-c", LAUNCHER, *what)
    assert result.returncode == 3, result.stderr
    assert "named: rank 1 of 2 was ended by SIGKILL: all were ended" in result.stdout
    assert (tmp_path / "sae" / "checkpoint.safetensors").exists()


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"there are 3 processes; data = 2 x latents = 2 needs 4"):
        Layout(2, 2).require(3, 100)
    with pytest.raises(ValueError, match="latents is 8, more than d_sae = 7"):
        Layout(1, 8).require(8, 7)
    with pytest.raises(ValueError, match=r"parallel\.data is 0; expected 1 to"):
        Layout(data=0)
    with pytest.raises(TypeError, match=r"parallel\.latents is '2'; expected an int"):
        Layout(latents="2")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="timeout_seconds is nan"):
        Layout(timeout_seconds=float("nan"))


def test_the_file_has_a_table(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(SETTINGS + "[parallel]\nlatents = 4\n")
    read = read_train_file(file)
    assert read.layout == Layout(latents=4)
    assert isinstance(read.config, TrainConfig)
    file.write_text(SETTINGS)
    assert read_train_file(file).layout is None
    file.write_text(SETTINGS + "[parallel]\nlatent = 4\n")
    with pytest.raises(ValueError, match=r"'latent' in \[parallel\]; did you mean 'latents'"):
        read_train_file(file)
    file.write_text(SETTINGS + "[parallel]\ndata = 1.5\n")
    with pytest.raises(TypeError, match=r"run\.toml: .*parallel\.data is 1\.5; expected an int"):
        read_train_file(file)
    file.write_text('parallel = "no table"\n' + SETTINGS)
    with pytest.raises(TypeError, match="parallel is 'no table'; expected a table"):
        read_train_file(file)
