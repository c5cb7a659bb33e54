"""SAEs compared in one picture: codes a row against what is left unexplained, and against the
cross-entropy that is recovered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1sae_fast.atomic import replacing

_COLOURS = ("#2b6cb0", "#dd8a1e", "#2f855a", "#c53030", "#6b46c1", "#718096")

Entry = dict[str, Any]


def points(entries: Sequence[Entry], part: str, figure: str) -> list[tuple[Entry, float, float]]:
    """Entry, L0 and figure of those that have both."""
    found = []
    for one in entries:
        measured = one.get(part) or {}
        l0, value = measured.get("l0"), measured.get(figure)
        if l0 is not None and value is not None:
            found.append((one, float(l0), float(value)))
    return found


def write_picture(entries: Sequence[Entry], path: Path) -> None:
    """Draws a report's entries to a PNG; SAEs of one size share a colour and a line.

    Raises:
        ValueError: there is nothing to draw.
        OSError: the file can't be written.
    """
    # Not pyplot: it would pick a backend for the whole process.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The variance as measured on activations; where there is none of that, on the texts.
    where = "reconstruction" if points(entries, "reconstruction", "fvu") else "in_model"
    panels = [
        ("Variance unexplained", "FVU (lower is better)", points(entries, where, "fvu")),
        (
            "Cross-entropy recovered",
            "recovered of zero ablation (higher is better)",
            points(entries, "in_model", "ce_recovered_zero"),
        ),
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise ValueError(
            "no SAE has an L0 with an FVU or a cross-entropy; there is nothing to draw"
        )
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
        figure = Figure(figsize=(6.2 * len(panels), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, label, found) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.set_title(title)
            axes.set_xlabel("L0 (mean codes a row)")
            axes.set_ylabel(label)
            _draw(axes, found)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def _draw(axes: Any, found: Sequence[tuple[Entry, float, float]]) -> None:
    sizes = sorted({one["d_sae"] for one, _, _ in found})
    for number, size in enumerate(sizes):
        colour = _COLOURS[number % len(_COLOURS)]
        group = sorted((l0, value, one["name"]) for one, l0, value in found if one["d_sae"] == size)
        axes.plot(
            [l0 for l0, _, _ in group], [value for _, value, _ in group],
            color=colour, marker="o", linewidth=1.2, label=f"{size:,} features",
        )  # fmt: skip
        for l0, value, name in group:
            axes.annotate(
                name, (l0, value), xytext=(5, 5), textcoords="offset points", fontsize=8,
                color=colour, parse_math=False,
            )  # fmt: skip
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.margins(x=0.2, y=0.15)
    axes.legend(frameon=False)
