"""A picture of training runs from their metrics: one panel a figure, one line a run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1sae_fast.atomic import replacing
from r1sae_fast.train import metrics

__all__ = ["draw_curves"]


@dataclass(frozen=True)
class _Panel:
    key: str
    title: str
    factor: float = 1.0
    logarithmic: bool = False


_PANELS = (
    _Panel("fvu", "fraction of variance unexplained", logarithmic=True),
    _Panel("l0", "codes a row (L0)"),
    _Panel("dead_fraction", "dead features (%)", 100.0),
    _Panel("aux_loss", "leftover that dead features miss"),
    _Panel("learning_rate", "learning rate"),
    _Panel("tokens_per_second", "thousand tokens a second", 1e-3),
)


def draw_curves(runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Draws the metrics of finished or running runs to a PNG.

    Args:
        runs: folders that :func:`train` writes; several are drawn over each other, named by the
            part of their path in which they differ.
        path: the picture, replaced whole.

    Raises:
        FileNotFoundError: a folder without metrics (or without a whole line of them yet).
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("no runs to draw; give at least one folder")
    folders = [Path(run) for run in runs]
    lines = {}
    for name, folder in zip(_names(folders), folders, strict=True):
        lines[name] = metrics.read_lines(folder / metrics.FILE)
        if not lines[name]:
            raise FileNotFoundError(
                f"{folder}: no line of {metrics.FILE} in it (yet); give a folder that r1sae train "
                "writes"
            )
    # Not pyplot: it would pick a backend for the whole process.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(13, 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
            _draw(axes, panel, lines)
        if len(lines) > 1:
            handles, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4))
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=130, format="png")


def _draw(axes: Any, panel: _Panel, runs: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    largest = 0.0
    unit = 1e6 if max(line["tokens"] for of in runs.values() for line in of) >= 1e6 else 1e3
    for name, lines in runs.items():
        found = (line.get(panel.key) for line in lines)
        values = [math.nan if value is None else panel.factor * value for value in found]
        largest = max(largest, *(value for value in values if not math.isnan(value)), 0.0)
        axes.plot(
            [line["tokens"] / unit for line in lines],
            values,
            label=name,
            linewidth=1.3,
            marker="o" if len(lines) == 1 else None,
        )
    axes.set_title(panel.title)
    axes.set_xlabel(f"tokens ({'millions' if unit > 1e3 else 'thousands'})")
    axes.grid(alpha=0.25, linewidth=0.5)
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, max(largest * 1.08, 1e-9))


def _names(folders: list[Path]) -> list[str]:
    """Each folder's path without what all have in common; numbered where two are the same."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        return [f"{number}: {folder.name}" for number, folder in enumerate(folders, 1)]
    common = len(parts[0]) - 1
    if len(parts) > 1:
        common = len(Path(os.path.commonpath(folder.resolve() for folder in folders)).parts)
    return ["/".join(part[common:]) or part[-1] for part in parts]
