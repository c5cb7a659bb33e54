"""A training step in one process of two threads and in two ranks of one thread, in turns of runs.

    python benches/parallel/ranks.py D_IN D_SAE K ROWS STEPS

Tells the median step and the first rank's peak memory. Rows cross between ranks as bfloat16, as
they are stored.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from r1sae_fast.train import TrainConfig
from r1sae_fast.train.parallel import ALONE, Layout
from r1sae_fast.train.parallel.grid import Grid
from r1sae_fast.train.step import Learner

CPU = torch.device("cpu")


def run(layout: Layout, rank: int, meeting: str, numbers: list[int]) -> None:
    """One rank's steps; the first one tells."""
    d_in, d_sae, k, rows, steps = numbers
    torch.set_num_threads(2 // layout.processes)
    ranks = ALONE
    if layout.processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=layout.processes,
            timeout=timedelta(seconds=300),
        )
        ranks = Grid(layout, CPU)
    config = TrainConfig(d_sae=d_sae, k=k, tokens=rows * 1000, batch_size=rows)
    learner = Learner(config, d_in, CPU, ranks=ranks)
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(steps):
        x = torch.randn(rows, d_in, generator=generator).bfloat16()
        part, parts = ranks.part
        own = x[rows * part // parts : rows * (part + 1) // parts]
        ranks.agree(True)  # all are ready
        start = time.perf_counter()
        whole, _ = ranks.rows(own, 0)
        learner.step(whole.float(), 1e-4)
        times.append(time.perf_counter() - start)
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        step = statistics.median(times[len(times) // 3 :]) * 1e3
        sys.stdout.write(f"data {layout.data} latents {layout.latents}: {step:.0f} ms a step, ")
        sys.stdout.write(f"peak {peak:.2f} GB\n")
        sys.stdout.flush()


def main() -> None:
    """Runs one layout after the other, in forks of this process."""
    numbers = [int(argument) for argument in sys.argv[1:6]]
    for layout in (Layout(), Layout(latents=2), Layout(data=2)):
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(layout.processes):
                child = os.fork()
                if child == 0:
                    run(layout, rank, f"{folder}/meeting", numbers)
                    os._exit(0)
                children.append(child)
            for child in children:
                os.waitpid(child, 0)


if __name__ == "__main__":
    main()
