"""Run by test_kill.py: harvests in child processes that are killed with SIGKILL at random moments.

Children are forked from this process, so that torch is imported once. Arguments: checkpoint,
folder, number of kills, seed. Prints, as JSON, how many children were killed and in how many
different states they left the folder.
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

from r1sae_fast.harvest import HarvestProgress, harvest
from r1sae_fast.r1 import LocalEngine

SETTINGS = {"batch_size": 3, "max_new_tokens": 10, "rows_per_shard": 100}
PROMPTS = [f"What is {i} plus {i + 1}?" for i in range(120)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Doomed:
    """Ends the process ``delay`` seconds after so many batches, at the latest after three more."""

    def __init__(self, batches: int, delay: float) -> None:
        self.batches, self.delay, self.seen = batches, delay, 0

    def __call__(self, _: HarvestProgress) -> None:
        self.seen += 1
        if self.seen == self.batches:
            threading.Timer(self.delay, die).start()
        if self.seen == self.batches + 3:
            die()


def main(checkpoint: str, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    engine = LocalEngine.from_pretrained(checkpoint)
    start = time.monotonic()
    harvest(engine, PROMPTS, 1, folder / "undisturbed", **SETTINGS)  # type: ignore[arg-type]  # ints
    batch = (time.monotonic() - start) * SETTINGS["batch_size"] / len(PROMPTS)
    rng = random.Random(seed)
    killed, states = 0, set()
    for _ in range(kills):
        # Counted in batches, so that a slow machine and a fast one see the same kills; from a
        # batch's end on for as long as two take: within a batch, a write or a sync.
        batches, delay = rng.randint(1, 3), rng.random() * 2 * batch
        child = os.fork()
        if child == 0:
            doomed = Doomed(batches, delay)
            harvest(  # type: ignore[misc]
                engine, PROMPTS, 1, folder / "killed", progress=doomed, **SETTINGS
            )
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        states.add(tuple(sorted(path.name for path in (folder / "killed").glob("*"))))
    last = harvest(engine, PROMPTS, 1, folder / "killed", **SETTINGS)  # type: ignore[arg-type]  # ints
    print(json.dumps({"killed": killed, "states": len(states), "sequences": last.sequences}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
