"""A training run of many processes: what each of them calls."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train.checkpoint import Checkpoint
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.folders import locked
from r1sae_fast.train.metrics import Metrics
from r1sae_fast.train.parallel.collect import gather, gather_ragged
from r1sae_fast.train.parallel.grid import Grid, begin
from r1sae_fast.train.parallel.layout import Layout
from r1sae_fast.train.run import Run

__all__ = ["is_launched", "processes", "train_in_parallel"]


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or a launcher that sets its variables, has started this process."""
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many of them it has started."""
    return int(environment["WORLD_SIZE"])


def train_in_parallel(
    shards: ActivationShards,
    out_dir: str | os.PathLike[str],
    config: TrainConfig,
    layout: Layout,
    *,
    resume: bool = True,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 60.0,
    log_every: int | None = None,
    progress: bool | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
) -> FastSAE | None:
    """:func:`r1sae_fast.train.train` in ``layout.processes`` processes, all of which call it.

    They are started by torchrun (or have called ``torch.distributed.init_process_group``, with
    "gloo" or, for GPUs, "cpu:gloo,cuda:nccl"), read the same shards and see the same folder.
    Selection, dead counts, norms and averages are those of the whole batch and all features: the
    weights are a single process's but for the order in which numbers are added up. So is the
    checkpoint: a run may go on in any number of processes.

    Args:
        shards: what to train on; each process reads its part of every batch.
        out_dir: on a file system that all processes share; the first one writes.
        config: everything that decides the weights.
        layout: how rows and features are shared out.
        resume: as for one process.
        device: "cpu", or "cuda" for the GPU of each process's ``LOCAL_RANK``.
        checkpoint_seconds: by the first process's clock.
        log_every: as for one process.
        progress: the first process's.
        on_metrics: called in every process.

    Returns:
        The SAE in the first process, None in the others.

    Raises:
        ValueError: another number of processes than the layout's, or of other settings.
        LostRankError: another process is gone.
        Exception: what :func:`r1sae_fast.train.train` raises.
    """
    at = torch.device(device)
    if at.type == "cuda" and at.index is None:
        at = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(at)
    log_every = max(1, config.steps // 200) if log_every is None else log_every
    with _group(at, layout):
        # What decides which collective calls a rank makes: before the first that not all make.
        told = {
            **config.to_dict(),
            "shards": shards.fingerprint,
            "d_in": shards.d_in,
            "parallel.data": layout.data,
            "parallel.latents": layout.latents,
            "resume": resume,
            "log_every": log_every,
        }
        _require_same(told, at)
        layout.require(dist.get_world_size(), config.d_sae)
        grid = Grid(layout, at)
        folder = Path(out_dir)
        with locked(folder) if grid.is_first else nullcontext():
            # Others look into the folder once it is there.
            grid.agree(True)
            _require_same({"checkpoint": _found(folder)}, at)
            run = Run(shards, folder, config, at, resume=resume, ranks=grid)
            run.go(
                checkpoint_seconds=checkpoint_seconds,
                log_every=log_every,
                progress=progress,
                on_metrics=on_metrics,
            )
            sae = None
            if grid.is_first:
                sae = run.sae()
                sae.save(folder)
            # None ends, and is found missing, while another still works.
            grid.agree(True)
            return sae


@contextmanager
def _group(device: torch.device, layout: Layout) -> Iterator[None]:
    """The default process group: the caller's, or one for the time of the run."""
    if dist.is_initialized():
        yield
        return
    begin(device, layout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _found(folder: Path) -> str:
    """Which checkpoint this process sees."""
    saved = Checkpoint.read(folder, only=())
    if saved is None:
        return "none"
    header = json.dumps([saved.identity, vars(saved.counters), saved.loader], sort_keys=True)
    # Other folders may have one of the same step.
    return f"step {saved.counters.step}, {hashlib.sha256(header.encode()).hexdigest()[:8]}"


def _require_same(told: dict[str, Any], device: torch.device) -> None:
    """Raises ValueError, in all ranks, where they differ in what they were told or have found."""
    assert dist.group.WORLD is not None
    text = json.dumps(told, default=str).encode()
    own = torch.tensor(list(text), dtype=torch.uint8, device=device)
    lengths = gather(torch.tensor([len(text)], device=device), dist.group.WORLD)
    sizes: list[int] = lengths[:, 0].tolist()
    first, *others = (
        json.loads(bytes(one.tolist())) for one in gather_ragged(own, sizes, dist.group.WORLD)
    )
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"rank {rank} has {name} = {other.get(name)!r}, rank 0 has "
                    f"{first.get(name)!r}; give all the same settings, shards, and a folder on a "
                    "file system that they share"
                )
