"""kill -9 at random moments, then the same command again: the weights of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.shards import ActivationShards

# Imports torch once, then forks a process for each run that it is told of: twenty imports take
# longer than twenty runs. It has started no threads, so its copies have none missing. A run that
# is to die does so a random moment after so many lines of its metrics, and three lines later at
# the latest, so that a slow machine and a fast one see the same kills.
PROGRAM = r"""
import os, signal, sys, threading
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train
config = TrainConfig(
    d_sae=128, k=4, tokens=500_000, batch_size=500, learning_rate=1e-2, dead_after_tokens=20_000
)
def die(): os.kill(os.getpid(), signal.SIGKILL)
for line in sys.stdin:
    folder, lines, seconds = line.split()
    child = os.fork()
    if child == 0:
        seen = 0
        def count(_):
            global seen
            seen += 1
            if seen == int(lines):
                threading.Timer(float(seconds), die).start()
            if int(lines) and seen == int(lines) + 3:
                die()
        shards = ActivationShards(sys.argv[1])
        train(shards, folder, config, log_every=3, checkpoint_seconds=0, progress=False,
              on_metrics=count)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments(shards: ActivationShards, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(shards.folder)]
    pipe = subprocess.PIPE
    moments = random.Random(0)
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:

        def run(folder: str, lines: int = 0, seconds: float = 0.0) -> int:
            """A run, killed so long after so many lines unless 0; its exit status."""
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{tmp_path / folder} {lines} {seconds}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        for _ in range(KILLS):
            status = run("killed", moments.randint(1, 5), moments.uniform(0, 0.05))
            assert status == -signal.SIGKILL
        assert run("killed") == 0
        assert run("undisturbed") == 0
        assert process.stdin is not None
        process.stdin.close()
    expected = FastSAE.load(tmp_path / "undisturbed").state_dict()
    found = FastSAE.load(tmp_path / "killed").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert not list((tmp_path / "killed").glob("*.tmp"))


STOPPED = r"""
import os, signal, sys
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train
config = TrainConfig(d_sae=64, k=4, tokens=40_000, batch_size=500, learning_rate=1e-2)
shards = ActivationShards(sys.argv[1])
tell = lambda line: os.kill(os.getpid(), signal.SIGTERM) if sys.argv[3:] else None
train(shards, sys.argv[2], config, log_every=7, progress=False, on_metrics=tell)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_told_to_stop_it_saves_and_goes_on(shards: ActivationShards, tmp_path: Path) -> None:
    def run(folder: str, *stop: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", STOPPED, str(shards.folder), str(tmp_path / folder), *stop]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("undisturbed").returncode == 0
    first = run("stopped", "stop")
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    # The line of step 7 brings the signal; the step after it is the last, and is kept.
    assert "saved at step 8 of 80" in first.stderr
    assert run("stopped").returncode == 0
    expected = FastSAE.load(tmp_path / "undisturbed").state_dict()
    found = FastSAE.load(tmp_path / "stopped").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
