"""The demo's lines in the terminal while it runs: one a stage, a bar below while it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

WIDTH = 100
Report = Callable[[float, float, str], None]
"""Called with done, total (0: unknown) and a note."""


class Display:
    """Writes to ``console``; bars only where that is a terminal."""

    def __init__(self, console: Console, stages: int) -> None:
        self.console = console
        self.stages = stages
        self._number = 0

    @contextmanager
    def stage(self, what: str) -> Iterator[Report]:
        """A stage that is being worked on."""
        self._number += 1
        columns = (
            SpinnerColumn(style="cyan"),
            TextColumn("[cyan]{task.description}[/]"),
            BarColumn(bar_width=28),
            TextColumn("[dim]{task.fields[note]}[/]"),
            TimeElapsedColumn(),
        )
        shown = self.console.is_terminal
        with Progress(
            *columns, console=self.console, transient=True, disable=not shown
        ) as progress:
            task = progress.add_task(f"{self._number}/{self.stages} {what}", total=None, note="")

            def report(done: float, total: float, note: str) -> None:
                progress.update(task, completed=done, total=total or None, note=note)

            yield report

    def finished(self, name: str, said: str, seconds: float, *, before: bool) -> None:
        """The line that stays; ``before``: the stage was finished by an earlier run."""
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=1)
        grid.add_column(width=9, style="bold")
        grid.add_column(ratio=1, overflow="fold")
        grid.add_column(width=14, justify="right", style="dim")
        took = "done before" if before else f"{seconds:.1f} s"
        mark = Text("=" if before else "✓", style="dim" if before else "green")
        grid.add_row(mark, name, Text(said, style="dim" if before else ""), took)
        self.console.print(grid)

    def skipped(self) -> None:
        """Counts a stage that needs no work."""
        self._number += 1


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._start
