"""Run by test_kill.py: streaming harvests in child processes that SIGKILL ends at random moments.

Children are forked from this process, so that torch is imported once. Arguments: checkpoint,
folder, number of kills, seed. Prints, as JSON, how many children were killed, in how many
different states of scratch and shards, and how many passes went on from a finished block.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from r1sae_fast.harvest import harvest
from r1sae_fast.r1.engines.stream import StreamEngine, StreamProgress
from r1sae_fast.r1.stream.speeds import Speeds

LAYER = 3
SPEEDS = Speeds(disk=1e9, flops=1e11, expert_flops=1e11, dequantize=1e9)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(5, 60, (90,), generator=generator).tolist()
    return [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]


def run(checkpoint: str, out: Path, batches: int | None = None, delay: float = 0.0) -> int:
    """Harvests all; returns the first block that was run. Given a number of micro-batches, the
    process is killed ``delay`` seconds after so many."""
    blocks: list[StreamProgress] = []

    def progress(now: StreamProgress) -> None:
        blocks.append(now)
        if len(blocks) == batches:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if batches is not None and len(blocks) == batches + 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with StreamEngine(
        checkpoint,
        pass_tokens=800,
        scratch=out / ".stream",
        speeds=SPEEDS,
        on_progress=progress,
    ) as engine:
        harvest(engine, prompts(), LAYER, out, mode="prefill", batch_size=4, rows_per_shard=300)
    return blocks[0].block if blocks else 0


def main(checkpoint: str, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    begin = time.monotonic()
    run(checkpoint, folder / "undisturbed")
    batch = (time.monotonic() - begin) / 90
    rng = random.Random(seed)
    killed, states = 0, set()
    out = folder / "killed"
    for _ in range(kills):
        kill = rng.random(), rng.random()
        child = os.fork()
        if child == 0:
            # Not told that it will die; somewhere within a micro-batch, a write or a sync.
            run(checkpoint, out, 1 + int(kill[0] * 20), kill[1] * 2 * batch)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        state = out / ".stream" / "state.json"
        blocks = json.loads(state.read_bytes())["blocks"] if state.exists() else 0
        states.add((blocks, *sorted(path.name for path in out.glob("shard-*"))))
    went_on = run(checkpoint, out)
    print(json.dumps({"killed": killed, "states": len(states), "first_block": went_on}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
