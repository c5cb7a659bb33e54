"""The demo's picture: training curve, feature densities, the detector of wrong steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from r1sae_fast.atomic import replacing
from r1sae_fast.demo.findings import Findings
from r1sae_fast.demo.show import MOMENT_NAMES

_BLUE, _ORANGE, _RED, _GREY = "#2b6cb0", "#dd8a1e", "#c53030", "#718096"


def write_picture(findings: Findings, path: Path) -> None:
    """Draws ``findings`` to a PNG."""
    # Not pyplot: it would pick a backend for the whole process.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    with rc_context(style):
        figure = Figure(figsize=(14, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        training, densities, detector = figure.subplots(1, 3)
        _draw_training(training, findings)
        _draw_densities(densities, findings)
        _draw_detector(detector, findings)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def _draw_training(axes: Any, findings: Findings) -> None:
    lines = findings.training
    tokens = [line["tokens"] / 1e6 for line in lines]
    axes.set_title("Training")
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("fraction of variance unexplained", color=_BLUE)
    fvus = [line["fvu"] for line in lines]
    axes.plot(tokens, fvus, color=_BLUE, linewidth=1.6)
    held_out = findings.sae["fvu_batch_topk"]
    axes.axhline(held_out, color=_BLUE, linewidth=0.9, linestyle=":")
    axes.annotate(
        f"held-out {held_out:.3f}", (0, held_out), xycoords=("axes fraction", "data"),
        xytext=(4, 3), textcoords="offset points", va="bottom", color=_BLUE,
    )  # fmt: skip
    _logarithmic(axes, 0.9 * min(*fvus, held_out), 1.1 * max(*fvus, held_out))
    axes.grid(alpha=0.25, linewidth=0.5)
    dead = axes.twinx()
    dead.spines["right"].set_visible(True)
    dead.plot(tokens, [100 * line["dead_fraction"] for line in lines], color=_ORANGE, linewidth=1.2)
    dead.set_ylabel("dead features (%)", color=_ORANGE)
    dead.set_ylim(0, max(5.0, *dead.get_ylim()))


def _logarithmic(axes: Any, low: float, high: float) -> None:
    """A log scale of y, with a number at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    # First: matplotlib warns if it is to choose limits for bars that are all as high.
    axes.set_ylim(low, high)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_densities(axes: Any, findings: Findings) -> None:
    density = np.asarray(findings.density)
    alive = np.log10(density[density > 0])
    axes.set_title("How often features fire")
    axes.set_xlabel("share of held-out tokens on which a feature fires")
    axes.set_ylabel("features")
    if len(alive):
        low, high = min(np.floor(alive.min()), -1.0), 0.0
        edges = np.linspace(low, high, int((high - low) * 8) + 1)
        axes.hist(alive, bins=edges, color=_BLUE, alpha=0.85, edgecolor="white", linewidth=0.4)
        median = float(np.median(alive))
        axes.axvline(median, color=_GREY, linestyle="--", linewidth=1)
        axes.set_ylim(0, 1.18 * axes.get_ylim()[1])
        axes.annotate(
            f"median {10**median:.2%}", (median, 1), xycoords=("data", "axes fraction"),
            xytext=(4, -2), textcoords="offset points", va="top", color=_GREY,
        )  # fmt: skip
        ticks = np.arange(int(low), 1)
        axes.set_xticks(ticks, [f"$10^{{{tick}}}$" if tick else "1" for tick in ticks])
    silent = int((density == 0).sum())
    axes.annotate(
        f"{silent:,} of {len(density):,} silent here", (0.02, 0.97), xycoords="axes fraction",
        va="top", color=_GREY,
    )  # fmt: skip
    axes.grid(alpha=0.25, axis="y", linewidth=0.5)


def _draw_detector(axes: Any, findings: Findings) -> None:
    first = findings.first
    axes.set_title("What tells a wrong step")
    if first is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "too few steps to say", ha="center", color=_GREY)
        return
    wrong, right = np.asarray(findings.wrong_strengths), np.asarray(findings.right_strengths)
    largest = max(float(wrong.max()), float(right.max())) or 1.0
    edges = np.linspace(0, largest, 25)
    for values, colour, name in ((right, _GREY, "right steps"), (wrong, _RED, "wrong steps")):
        axes.hist(
            values, bins=edges, weights=np.full(len(values), 100 / max(len(values), 1)),
            color=colour, alpha=0.65, label=f"{name} ({len(values)})",
        )  # fmt: skip
    _logarithmic(axes, 0.05, 150)
    axes.set_xlabel(f"strength of feature {first.feature} {MOMENT_NAMES[first.moment]}")
    axes.set_ylabel("share of steps (%)")
    axes.legend(
        frameon=False,
        title=f"AUROC {first.auroc:.3f} ({first.low:.3f}-{first.high:.3f})",
        alignment="left",
    )
    axes.grid(alpha=0.25, axis="y", linewidth=0.5)
