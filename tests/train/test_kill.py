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

# Imports torch once, then forks a process for each run that it is told of: twenty imports take
# longer than twenty runs. It has started no threads, so its copies have none missing.
PROGRAM = r"""
import os, sys
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train
config = TrainConfig(
    d_sae=128, k=4, tokens=500_000, batch_size=500, learning_rate=1e-2, dead_after_tokens=20_000
)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        shards = ActivationShards(sys.argv[1])
        train(shards, line.strip(), config, log_every=3, checkpoint_seconds=0, progress=False)
        os._exit(0)
    for line in sys.stdin:
        if line == "kill\n":
            os.kill(child, 9)  # not waited for yet, so that its number is no other process's
        status = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG * (line == "?\n"))
        if status is not None:
            os.waitpid(child, 0)
            print(status.si_status, flush=True)
            break
        print("running", flush=True)
"""
KILLS = 20


class Runs:
    """Starts runs, one at a time."""

    def __init__(self, shards: ActivationShards) -> None:
        command = [sys.executable, "-c", PROGRAM, str(shards.folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _ask(self, line: str) -> str:
        """How the run ended ("0", or the signal's number), or "running"."""
        assert self.process.stdout is not None
        self._say(line)
        return self.process.stdout.readline().strip()

    def finish(self, folder: Path) -> None:
        """Starts a run and waits until it is done."""
        self._say(str(folder))
        assert self._ask("wait") == "0"

    def kill(self, folder: Path, delay: float) -> bool:
        """Kills a run ``delay`` seconds after its first new line; False if it finished before."""
        metrics = folder / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        self._say(str(folder))
        while not metrics.exists() or metrics.stat().st_mtime_ns == before:
            time.sleep(0.005)
            state = self._ask("?")
            if state != "running":
                assert state == "0"
                return False
        time.sleep(delay)
        return int(self._ask("kill")) == signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_at_random_moments(shards: ActivationShards, tmp_path: Path) -> None:
    runs = Runs(shards)
    rng = random.Random(0)
    with runs.process:
        try:
            kills = sum(runs.kill(tmp_path / "killed", rng.uniform(0, 0.1)) for _ in range(KILLS))
            runs.finish(tmp_path / "killed")
            runs.finish(tmp_path / "undisturbed")
        finally:
            assert runs.process.stdin is not None
            runs.process.stdin.close()
    assert kills >= KILLS / 2  # a fast machine may finish before the last of them
    expected = FastSAE.load(tmp_path / "undisturbed").state_dict()
    found = FastSAE.load(tmp_path / "killed").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert not list((tmp_path / "killed").glob("*.tmp"))
