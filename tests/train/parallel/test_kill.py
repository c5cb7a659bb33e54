"""Ranks that are killed or told to stop, again and again: the weights of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.shards import ActivationShards

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

# Runs into the folders that are told, of which some have a rank that dies at the line of a step:
# before it is saved, or (the other ranks) while it is.
PROGRAM = r"""
import os, signal
from r1sae_fast.errors import LostRankError
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.parallel.run import train_in_parallel

shards, folders, deaths = [eval(text) for text in arguments]
layouts, expected = [(1, 2)] * len(folders), None
acts = ActivationShards(shards)
config = TrainConfig(
    d_sae=45, k=3, tokens=1500, batch_size=50, learning_rate=1e-3, dead_after_tokens=400
)

def work(layout, rank, known):
    step, of_rank = deaths[number]
    def die(line):
        if line.step >= step and rank == of_rank:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        train_in_parallel(
            acts, folders[number], config, layout, log_every=1, checkpoint_seconds=0,
            progress=False, on_metrics=die if step else None,
        )
    except LostRankError:
        raise SystemExit(75) from None
"""
KILLS = 10


def require_equal(one: Path, other: Path) -> None:
    expected, found = FastSAE.load(one).state_dict(), FastSAE.load(other).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert not list(other.glob("*.tmp"))


def test_ranks_killed_ten_times(
    acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks
) -> None:
    draw = random.Random(0)
    # Each run gets at least a step further than the last checkpoint, 30 steps in all.
    deaths = [(2 + 2 * kill + draw.randint(0, 5), draw.randint(0, 1)) for kill in range(KILLS)]
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    folders = [killed] * (KILLS + 1) + [whole]
    told = map(repr, (str(acts.folder), folders, [*deaths, (0, 0), (0, 0)]))
    result = run_ranks(PROGRAM, *told)
    statuses = [line for line in result.stdout.splitlines() if line.startswith("statuses")]
    for line, (_, rank) in zip(statuses, deaths, strict=False):
        assert line == ("statuses -9 75" if rank == 0 else "statuses 75 -9"), result.stderr
    assert statuses[KILLS:] == ["statuses 0 0"] * 2, result.stderr
    require_equal(tmp_path / "whole", tmp_path / "killed")


# Read by every Python that starts with it on its path. In the first rank, at the line of step 8,
# the launcher gets SIGTERM, and no step is taken before the launcher has handed it on.
STOPPING = r"""
import os
if os.environ.get("RANK") == "0":
    import signal, time
    from r1sae_fast.train.metrics import MetricsFile
    append = MetricsFile.append
    def append_and_stop(self, line):
        append(self, line)
        if line.step != 8:
            return
        before, told = signal.getsignal(signal.SIGTERM), []
        def tell(number, frame):
            told.append(number)
            before(number, frame)
        signal.signal(signal.SIGTERM, tell)
        launcher = os.getppid()
        if launcher == 1:
            os._exit(3)
        os.kill(launcher, signal.SIGTERM)
        while not told and os.getppid() == launcher:
            time.sleep(0.01)
    MetricsFile.append = append_and_stop
"""
SETTINGS = """
shards = "activations"
out = "stopped"
d_sae = 45
k = 3
tokens = 1500
batch_size = 50
learning_rate = 1e-3
dead_after_tokens = 400
evaluate_rows = 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_a_launcher_that_is_told_to_stop(
    acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks
) -> None:
    (tmp_path / "run.toml").write_text(SETTINGS)
    (tmp_path / "on_path").mkdir()
    (tmp_path / "on_path" / "sitecustomize.py").write_text(STOPPING)
    path = os.pathsep.join(filter(None, [str(tmp_path / "on_path"), os.environ.get("PYTHONPATH")]))
    command = ["-m", "r1sae_fast.cli", "train", str(tmp_path / "run.toml"), "--processes", "2"]
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    # As one process does: status and word.
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert result.stderr.count("told to stop; saved at step 9 of 30") == 1
    folders = [str(tmp_path / "stopped"), str(tmp_path / "whole")]
    again = run_ranks(PROGRAM, *map(repr, (str(acts.folder), folders, [(0, 0)] * 2)))
    assert again.stdout.count("statuses 0 0") == 2, again.stderr
    require_equal(tmp_path / "whole", tmp_path / "stopped")
