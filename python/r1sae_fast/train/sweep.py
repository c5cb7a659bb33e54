"""Several SAEs from one pass over the rows, and so from one forward of the model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from r1sae_fast.atomic import write_bytes
from r1sae_fast.sae import FastSAE
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.folders import DIVERGED, locked
from r1sae_fast.train.lockstep import lockstep
from r1sae_fast.train.metrics import Metrics
from r1sae_fast.train.parallel import ALONE, Ranks
from r1sae_fast.train.run import Run
from r1sae_fast.train.standardise import Source

__all__ = ["SweepResult", "sweep_configs", "train_sweep"]

_SHARED = ("tokens", "batch_size", "outlier_factor", "order_seed")
"""What decides which rows come when, and must be the same for all."""


@dataclass(frozen=True)
class SweepResult:
    """What became of one SAE of a sweep."""

    name: str
    folder: Path
    sae: FastSAE | None
    """None where it diverged; of several processes, the first one has it."""
    error: str | None
    """Why, then."""


def sweep_configs(base: TrainConfig, grid: Mapping[str, Sequence[Any]]) -> dict[str, TrainConfig]:
    """Every combination of the values of ``grid``, by name, such as ``k=16,seed=1``.

    Args:
        base: all other settings; its ``data_seed``, or else its ``seed``, orders the rows of all.
        grid: values by field of :class:`TrainConfig`, in the order in which names have them.

    Raises:
        ValueError: an unknown field, no values, the same value twice, a combination that
            :class:`TrainConfig` refuses, or a field that decides about the rows.
        TypeError: values that are no list.
    """
    known = [field.name for field in fields(TrainConfig)]
    for name, values in grid.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key {name!r} in the sweep{hint}")
        if name in ("tokens", "batch_size", "outlier_factor", "data_seed"):
            raise ValueError(
                f"{name} is in the sweep, but its SAEs share one pass over the same batches; "
                "train apart what differs in that"
            )
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name} of the sweep is {values!r}; expected a list of values")
        if not values:
            raise ValueError(f"{name} of the sweep has no values")
    base = replace(base, data_seed=base.order_seed)
    found: dict[str, TrainConfig] = {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_spelled(value)}" for key, value in settings.items()) or "sae"
        if name in found:
            raise ValueError(f"{name} is twice in the sweep")
        try:
            found[name] = replace(base, **settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return found


def _spelled(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_spelled, value))
    return str(value)


def train_sweep(
    shards: Source,
    out_dir: str | os.PathLike[str],
    configs: Mapping[str, TrainConfig],
    *,
    resume: bool = True,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 60.0,
    log_every: int | None = None,
    progress: bool | None = None,
    on_metrics: Callable[[str, Metrics], None] | None = None,
) -> list[SweepResult]:
    """Trains an SAE for each of ``configs`` into ``out_dir/<its name>``; see :func:`train`.

    Each batch is read, standardised, and run through the model, once for all. Every SAE is, to the
    bit, what :func:`train` makes of the same config by itself; its folder is one that
    :func:`train` writes, and goes on with. Where one diverges the others go on.

    Args:
        shards: what to train on.
        out_dir: a folder of folders.
        configs: by name, which becomes the folder's; alike in ``tokens``, ``batch_size``,
            ``outlier_factor`` and the order of rows (``data_seed``, or ``seed`` where that is not
            given). See :func:`sweep_configs`.
        resume: go on from the checkpoints in the folders; SAEs at different steps join the pass
            each at its own.
        device: where all are trained, together.
        checkpoint_seconds: how often the state of each is saved.
        log_every: steps between two lines of metrics.
        progress: show a bar on stderr; default if that is a terminal.
        on_metrics: called with the SAE's name and each line of its metrics.

    Returns:
        One a config, in their order.

    Raises:
        ValueError: no configs, a name that is no folder's, or configs that need other batches.
        Exception: what :func:`train` raises, but for divergence.
    """
    check_sweep(configs)
    return run_sweep(
        shards,
        Path(out_dir),
        configs,
        lambda: ALONE,
        resume=resume,
        device=torch.device(device),
        checkpoint_seconds=checkpoint_seconds,
        log_every=log_every,
        progress=progress,
        on_metrics=on_metrics,
    )


def run_sweep(
    shards: Source,
    parent: Path,
    configs: Mapping[str, TrainConfig],
    make_ranks: Callable[[], Ranks],
    *,
    resume: bool,
    device: torch.device,
    checkpoint_seconds: float,
    log_every: int | None,
    progress: bool | None,
    on_metrics: Callable[[str, Metrics], None] | None,
) -> list[SweepResult]:
    """:func:`train_sweep` in the processes of ``make_ranks``, which is asked for those of each
    SAE; all of them call it. The first one has the SAEs."""
    ranks = make_ranks()
    if parent.exists() and not parent.is_dir():
        raise NotADirectoryError(f"{parent}: not a folder; give a folder for the SAEs")
    runs: list[Run] = []
    failed: dict[int, str] = {}
    with ExitStack() as stack:
        if ranks.is_first:
            for name in configs:
                stack.enter_context(locked(parent / name))
        ranks.agree(True)  # others look into the folders once they are there
        for number, (name, config) in enumerate(configs.items()):
            folder = parent / name
            if resume and (folder / DIVERGED).exists():
                failed[number] = (folder / DIVERGED).read_text(encoding="utf-8")
                continue
            like = runs[0] if runs else None
            own = make_ranks()
            runs.append(Run(shards, folder, config, device, resume=resume, ranks=own, like=like))
        numbers = [number for number in range(len(configs)) if number not in failed]
        names = list(configs)
        steps = next(iter(configs.values())).steps
        diverged = lockstep(
            runs,
            checkpoint_seconds=checkpoint_seconds,
            log_every=max(1, steps // 200) if log_every is None else log_every,
            progress=progress,
            on_metrics=[_teller(on_metrics, names[number]) for number in numbers],
        )
        saes: dict[int, FastSAE] = {}
        for place, (number, run) in enumerate(zip(numbers, runs, strict=True)):
            if place in diverged:
                failed[number] = str(diverged[place])
                # Not tried again by the next call, which would go through the rows for it.
                if ranks.is_first:
                    write_bytes(run.folder / DIVERGED, failed[number].encode())
            elif ranks.is_first:
                saes[number] = run.sae()
                saes[number].save(run.folder)
        return [
            SweepResult(name, parent / name, saes.get(number), failed.get(number))
            for number, name in enumerate(names)
        ]


def _teller(
    tell: Callable[[str, Metrics], None] | None, name: str
) -> Callable[[Metrics], None] | None:
    return None if tell is None else lambda line: tell(name, line)


def check_sweep(configs: Mapping[str, TrainConfig]) -> None:
    """Raises ValueError unless all can share one pass."""
    if not configs:
        raise ValueError("a sweep of no SAEs; give at least one config")
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        if not name or name in (".", "..") or Path(name).name != name:
            raise ValueError(f"an SAE of the sweep is called {name!r}; expected a folder's name")
        for field in _SHARED:
            mine, others = getattr(config, field), getattr(first, field)
            if mine != others:
                said = "data_seed (or seed)" if field == "order_seed" else field
                raise ValueError(
                    f"{name} has {said} {mine}, {first_name} {others}; SAEs of a sweep share one "
                    "pass over the same batches"
                )
