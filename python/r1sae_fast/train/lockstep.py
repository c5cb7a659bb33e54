"""One pass over the rows for one SAE or several."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from r1sae_fast.errors import TrainingDivergedError
from r1sae_fast.train.metrics import Metrics
from r1sae_fast.train.stopping import STATUS, told_to_stop

if TYPE_CHECKING:
    from r1sae_fast.train.run import Run

__all__ = ["lockstep"]


def lockstep(
    runs: Sequence[Run],
    *,
    checkpoint_seconds: float,
    log_every: int,
    progress: bool | None,
    on_metrics: Sequence[Callable[[Metrics], None] | None],
) -> dict[int, TrainingDivergedError]:
    """Takes the steps that are left of ``runs``, which share loader, standardisation and length.

    The rows come from the loader of the run that has come least far; others join in at the step at
    which they were saved. Each is fed what it would be by itself.

    Returns:
        The runs that diverged, by number; the others went on without them.

    Raises:
        SystemExit: told to stop; all are saved.
    """
    left = [number for number, run in enumerate(runs) if run.counters.step < run.config.steps]
    if not left:
        return {}
    behind = min((runs[number] for number in left), key=lambda run: run.counters.step)
    is_first = behind.ranks.is_first
    total, step = behind.config.steps, behind.counters.step
    diverged: dict[int, TrainingDivergedError] = {}
    stop = False
    with (
        _bar(total, step, len(left), progress if is_first else False) as shown,
        told_to_stop() as stopping,
    ):
        learning = {}
        for number in left:
            runs[number].loader = behind.loader
            tell = on_metrics[number]
            learning[number] = runs[number].learning(
                checkpoint_seconds=checkpoint_seconds,
                log_every=log_every,
                on_metrics=[shown] if tell is None else [shown, tell],
            )
            next(learning[number])
        batches = iter(behind.loader)
        while learning and not stop:
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            for number in learning:
                runs[number].clock.add("data", waited)
            rows = behind.standardisation.apply(batch, behind.device, behind.readers)
            (stop,) = behind.ranks.agree(stopping())
            for number, each in list(learning.items()):
                if runs[number].counters.step != step:
                    continue
                try:
                    each.send((rows, stop))
                except StopIteration:
                    del learning[number]
                except TrainingDivergedError as error:
                    del learning[number]
                    diverged[number] = error
            step += 1
        if stop and step < total:
            if is_first:
                where = behind.folder if len(runs) == 1 else behind.folder.parent
                print(  # noqa: T201  # what a batch job's log is read for
                    f"{where}: told to stop; saved at step {step} of {total}, go on with the same "
                    "command",
                    file=sys.stderr,
                )
            raise SystemExit(STATUS)
    return diverged


@contextmanager
def _bar(
    total: int, done: int, runs: int, progress: bool | None
) -> Iterator[Callable[[Metrics], None]]:
    """A bar with the newest figures beside it: those of the last of the runs."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda line: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training" if runs == 1 else f"training {runs} SAEs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, figures="")

        def show(line: Metrics) -> None:
            figures = f"FVU {line.fvu:.3f}  L0 {line.l0:.1f}  dead {line.dead_fraction:.1%}"
            speed = f"  {line.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=line.step, figures=figures + speed)

        yield show
