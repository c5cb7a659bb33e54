"""Runs programs in real processes that talk by gloo."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from r1sae_fast.shards import ActivationShards, ActivationWriter

# Imports torch once, runs the program's `before()` in one process and forks it: no thread has been
# started that a fork could lack. They meet at a file: no port.
HARNESS = r"""
import os, sys, traceback
from datetime import timedelta
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from r1sae_fast.train.parallel.grid import Grid
from r1sae_fast.train.parallel.layout import Layout
program, meeting = sys.argv[1:3]
arguments = sys.argv[3:]
space = {"arguments": arguments}
exec(compile(program, "program", "exec"), space)
known = space["before"]() if "before" in space else None
failed = []
for number, (data, latents) in enumerate(space["layouts"]):
    space["number"] = number
    children = []
    for rank in range(data * latents):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{meeting}-{number}", rank=rank,
                    world_size=data * latents, timeout=timedelta(minutes=10),
                )
                space["work"](Layout(data=data, latents=latents), rank, known)
                dist.destroy_process_group()
                status = 0
            except SystemExit as ended:
                status = ended.code
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("statuses", *statuses, flush=True)
    expected = space.get("expected", 0)
    failed += [status for status in statuses if status != expected and expected is not None]
sys.exit(1 if failed else 0)
"""

RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo would look up the machine's name, which in a container may be unknown."""
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """``run_ranks(program, *arguments)``: the program has ``layouts``, a list of (data, latents),
    and ``work(layout, rank, known)``, which all ranks of each run."""
    number = iter(range(1000))

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        meeting = tmp_path / f"meeting-{next(number)}"
        command = [sys.executable, "-c", HARNESS, program, str(meeting), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def acts(tmp_path: Path) -> ActivationShards:
    """1,500 rows of 24 numbers, made of 32 features, and some outliers, in several shards."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(32, 24, generator=generator), dim=1)
    on = torch.rand(1500, 32, generator=generator) < 3 / 32
    rows = (on * (1 + torch.rand(1500, 32, generator=generator))) @ directions + 3.0
    rows += 0.05 * torch.randn(1500, 24, generator=generator)
    rows[::100] *= 1000
    folder = tmp_path / "activations"
    with ActivationWriter(folder, 24, dtype="float32", rows_per_shard=700) as writer:
        writer.write(rows, sequence_id=torch.arange(1500) // 100, position=torch.arange(1500) % 100)
    return ActivationShards(folder)
