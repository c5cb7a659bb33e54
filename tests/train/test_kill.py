"""kill -9 at random moments, then the same command again: the weights of an undisturbed run."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.shards import ActivationShards

PROGRAM = """
import sys
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train
config = TrainConfig(d_sae=128, k=4, tokens=75_000, batch_size=500, learning_rate=1e-2)
train(ActivationShards(sys.argv[1]), sys.argv[2], config, log_every=3, checkpoint_seconds=0)
"""


def start(shards: ActivationShards, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(shards.folder), str(folder)])


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=120) == 0


@pytest.mark.slow
def test_a_run_killed_at_random_moments(shards: ActivationShards, tmp_path: Path) -> None:
    undisturbed = start(shards, tmp_path / "undisturbed")
    rng = random.Random(0)
    kills = 0
    for _ in range(3):
        with start(shards, tmp_path / "killed") as process:
            metrics = tmp_path / "killed" / "metrics.jsonl"
            before = metrics.stat().st_mtime_ns if metrics.exists() else 0
            while process.poll() is None and (
                not metrics.exists() or metrics.stat().st_mtime_ns == before
            ):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 1  # a fast machine may finish before the last of them
    finish(start(shards, tmp_path / "killed"))
    finish(undisturbed)
    expected = FastSAE.load(tmp_path / "undisturbed").state_dict()
    found = FastSAE.load(tmp_path / "killed").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert not list((tmp_path / "killed").glob("*.tmp"))
