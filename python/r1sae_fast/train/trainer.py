"""Trains an SAE on shards; killed at any point, the same call goes on to the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from r1sae_fast.sae import FastSAE
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.folders import locked
from r1sae_fast.train.metrics import Metrics
from r1sae_fast.train.run import Run
from r1sae_fast.train.standardise import Source

__all__ = ["train"]


def train(
    shards: Source,
    out_dir: str | os.PathLike[str],
    config: TrainConfig,
    *,
    resume: bool = True,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 60.0,
    log_every: int | None = None,
    progress: bool | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
) -> FastSAE:
    """Trains an SAE on ``shards`` and saves it in ``out_dir``.

    The folder gets what :meth:`FastSAE.save` writes, ``metrics.jsonl`` and
    ``checkpoint.safetensors``. The SAE takes raw activations (what training did to their centre and
    scale is folded into it) and has a threshold, so that it may be used in mode "threshold" too.
    On the CPU an interrupted run that is resumed gives the same weights to the bit, given as many
    threads. At SIGTERM it saves after the step that it is in, and exits with status 143.

    Args:
        shards: what to train on: rows that were harvested, or an engine's as it makes them; for a
            transcoder :class:`~r1sae_fast.shards.PairedShards`.
        out_dir: new, empty, or of a run that is gone on with.
        config: everything that decides the weights.
        resume: go on from the folder's checkpoint (a finished run is just loaded); False refuses a
            folder that has one.
        device: where to train.
        checkpoint_seconds: how often the state is saved.
        log_every: steps between two lines of metrics; default such that there are about 200.
        progress: show a bar on stderr; default if that is a terminal.
        on_metrics: called with each line of metrics.

    Returns:
        The trained SAE on the CPU, float32, in the mode it was trained in.

    Raises:
        FileExistsError: the folder has a checkpoint and ``resume`` is False, or holds other files.
        ValueError: the checkpoint is of other settings or other shards (named); no rows.
        NonFiniteError: a NaN or infinite activation; the row is named.
        TrainingDivergedError: the loss became NaN or infinite; the last checkpoint is kept.
        ShardError: another process trains into the folder.
    """
    folder = Path(out_dir)
    with locked(folder):
        run = Run(shards, folder, config, torch.device(device), resume=resume)
        run.go(
            checkpoint_seconds=checkpoint_seconds,
            log_every=max(1, config.steps // 200) if log_every is None else log_every,
            progress=progress,
            on_metrics=on_metrics,
        )
        run.learner.forget_moments()
        sae = run.sae()
        sae.save(folder)
        return sae
