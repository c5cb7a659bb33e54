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
from r1sae_fast.train.checkpoint import Checkpoint
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.engine_rows import EngineRows
from r1sae_fast.train.folders import locked
from r1sae_fast.train.metrics import Metrics
from r1sae_fast.train.parallel.collect import gather, gather_ragged
from r1sae_fast.train.parallel.grid import Grid, begin
from r1sae_fast.train.parallel.layout import Layout
from r1sae_fast.train.run import Run
from r1sae_fast.train.standardise import Source
from r1sae_fast.train.sweep import SweepResult, check_sweep, run_sweep

__all__ = [
    "is_first",
    "is_launched",
    "own_device",
    "processes",
    "sweep_in_parallel",
    "train_in_parallel",
]


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or a launcher that sets its variables, has started this process."""
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many of them it has started."""
    return int(environment["WORLD_SIZE"])


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the one that writes and speaks."""
    return environment.get("RANK", "0") == "0"


def train_in_parallel(
    shards: Source,
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
        shards: what to train on; each process reads its part of every batch, or has its engine run
            its share of the texts (:meth:`~r1sae_fast.train.EngineRows.share`).
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
    at = own_device(device)
    log_every = max(1, config.steps // 200) if log_every is None else log_every
    with _group(at, layout):
        _require_same(_told(shards, {"": config}, layout, resume, log_every), at)
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


def sweep_in_parallel(
    shards: Source,
    out_dir: str | os.PathLike[str],
    configs: Mapping[str, TrainConfig],
    layout: Layout,
    *,
    resume: bool = True,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 60.0,
    log_every: int | None = None,
    progress: bool | None = None,
    on_metrics: Callable[[str, Metrics], None] | None = None,
) -> list[SweepResult]:
    """:func:`r1sae_fast.train.train_sweep` in ``layout.processes`` processes, all of which call it;
    each of them trains its share of every SAE. See :func:`train_in_parallel`.

    Returns:
        One a config, in their order; the SAEs are with the first process.
    """
    check_sweep(configs)
    at, folder = own_device(device), Path(out_dir)
    with _group(at, layout):
        told = _told(shards, configs, layout, resume, log_every)
        told |= {f"{name}: checkpoint": _found(folder / name) for name in configs}
        _require_same(told, at)
        layout.require(dist.get_world_size(), min(one.d_sae for one in configs.values()))
        grid = Grid(layout, at)
        results = run_sweep(
            shards,
            folder,
            configs,
            grid.another,
            resume=resume,
            device=at,
            checkpoint_seconds=checkpoint_seconds,
            log_every=log_every,
            progress=progress,
            on_metrics=on_metrics,
        )
        grid.agree(True)
        return results


def own_device(
    device: torch.device | str, environment: Mapping[str, str] = os.environ
) -> torch.device:
    """Of this process: of "cuda" the GPU of its ``LOCAL_RANK``."""
    at = torch.device(device)
    if at.type == "cuda" and at.index is None:
        at = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(at)
    return at


def _told(
    shards: Source,
    configs: Mapping[str, TrainConfig],
    layout: Layout,
    resume: bool,
    log_every: int | None,
) -> dict[str, Any]:
    """What decides which collective calls a rank makes: before the first that not all make."""
    told = {
        f"{name}: {key}" if name else key: value
        for name, config in configs.items()
        for key, value in config.to_dict().items()
    }
    return told | {
        "shards": shards.fingerprint,
        "texts": shards.texts_checksum if isinstance(shards, EngineRows) else None,
        "d_in": shards.d_in,
        "parallel.data": layout.data,
        "parallel.latents": layout.latents,
        "resume": resume,
        "log_every": log_every,
    }


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
