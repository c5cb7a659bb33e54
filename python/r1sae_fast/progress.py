"""The one progress bar of long work: on stderr, and by default only where that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    what: str, total: float, *, unit: str = "", shown: bool | None = None
) -> Iterator[Callable[[float], None]]:
    """Gives a function that is told how much of ``total`` is done so far.

    Args:
        what: what is being done ("collecting examples").
        total: how much there is to do.
        unit: what is counted ("rows").
        shown: whether to draw at all; default: when stderr is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
