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
import time
from pathlib import Path

import torch

from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import LocalEngine

SETTINGS = {"batch_size": 3, "max_new_tokens": 10, "rows_per_shard": 100}
PROMPTS = [f"What is {i} plus {i + 1}?" for i in range(120)]


def main(checkpoint: str, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    engine = LocalEngine.from_pretrained(checkpoint)
    start = time.monotonic()
    harvest(engine, PROMPTS, 1, folder / "undisturbed", **SETTINGS)  # type: ignore[arg-type]  # ints
    whole = time.monotonic() - start
    rng = random.Random(seed)
    killed, states = 0, set()
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            # The child writes as a user's process would, and is never told that it will die.
            harvest(engine, PROMPTS, 1, folder / "killed", **SETTINGS)  # type: ignore[arg-type]  # ints
            os._exit(0)
        # Together about as long as the work takes, so that few children live to its end.
        time.sleep(rng.random() * 1.5 * whole / kills)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        states.add(tuple(sorted(path.name for path in (folder / "killed").glob("*"))))
    last = harvest(engine, PROMPTS, 1, folder / "killed", **SETTINGS)  # type: ignore[arg-type]  # ints
    print(json.dumps({"killed": killed, "states": len(states), "sequences": last.sequences}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
