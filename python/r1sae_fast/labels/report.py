"""What a person sees of a run: a live line, and at the end a table of labels with their scores."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from r1sae_fast.features.summary import Label
from r1sae_fast.features.text import visible
from r1sae_fast.labels.run import LabelRun

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_GOOD, _FAIR = 0.75, 0.6  # from here green, and yellow


@contextmanager
def live(shown: bool | None = None) -> Iterator[Callable[[LabelRun], None]]:
    """A line on stderr that follows a run; by default only where that is a terminal."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda run: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("labelling"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("labelling", total=None, told="")

        def watch(run: LabelRun) -> None:
            told = f"{run.asked.requests:,} requests"
            if run.spent:
                told += f", {run.spent:,.4g} spent"
            if run.waiting:
                told += f"; waiting: {visible(run.waiting)[:60]}"
            progress.update(task, total=run.total, completed=run.done, told=told)

        yield watch


def summary(run: LabelRun) -> list[str]:
    """A run in words, a line each."""
    asked = run.asked
    took = (
        f"{asked.requests:,} requests, {asked.prompt_tokens:,} prompt and "
        f"{asked.completion_tokens:,} completion tokens"
    )
    if asked.cost:
        took += f", cost {asked.cost:,.4g} ({run.spent:,.4g} in all)"
    lines = [f"{run.labelled:,} of {run.total:,} features labelled by {run.model_name}: {took}"]
    if run.before:
        lines.append(f"{run.before:,} were labelled before ({run.prompt_version})")
    if run.replayed:
        lines.append(f"{run.replayed:,} answers were there from an earlier run")
    if run.lost:
        lines.append(f"{run.lost:,} tries gave no answer, but may be billed")
    if run.skipped:
        lines.append(
            f"{len(run.skipped):,} keep their counted label alone, as they are active too rarely "
            "or nearly everywhere"
        )
    for why, count in Counter(run.failed.values()).most_common(3):
        which = next(feature for feature, reason in run.failed.items() if reason == why)
        lines.append(f"{count:,} failed, feature {which} so: {why}")
    if run.stopped:
        left = run.total - run.done
        lines.append(f"stopped, {left:,} features to go: {run.stopped} (--max-cost)")
    if run.unmerged:
        lines.append(f"not yet in the database: {run.unmerged}")
    return lines


def table(labels: Sequence[tuple[int, Label]]) -> Table:
    """Features, their labels and scores."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("feature", justify="right", no_wrap=True)
    for scorer in ("detection", "fuzzing"):
        shown.add_column(scorer, justify="right", no_wrap=True)
    shown.add_column("F1", justify="right", no_wrap=True)
    shown.add_column("label", overflow="fold")
    for feature, label in labels:
        by_name = {score.scorer: score for score in label.scores}
        figures = []
        for scorer in ("detection", "fuzzing"):
            score = by_name.get(scorer)
            accuracy = None if score is None else score.balanced_accuracy
            if score is None or accuracy is None:
                figures.append(Text("–", style="dim"))
            else:
                figures.append(_coloured(f"{accuracy:.2f} ±{score.margin:.2f}", accuracy))
        known = [s.f1 for s in label.scores if s.f1 is not None]
        f1 = f"{sum(known) / len(known):.2f}" if known else "–"
        shown.add_row(str(feature), *figures, f1, Text(visible(label.label)))
    return shown


def _coloured(text: str, accuracy: float) -> Text:
    from rich.text import Text

    style = "green" if accuracy >= _GOOD else "yellow" if accuracy >= _FAIR else "red"
    return Text(text, style=style)
