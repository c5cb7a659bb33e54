"""A feature in the terminal: its statistics, its labels, and its examples in heat colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from r1sae_fast.features.results import TopExample
from r1sae_fast.features.text import visible

if TYPE_CHECKING:
    from r1sae_fast.features.summary import FeatureSummary

# Backgrounds from faint to full strength; on each the text stays readable.
_HEAT = ("#fff3d6", "#ffe0a3", "#ffc266", "#ff9a3d", "#f2622e")
_BARS = " ▁▂▃▄▅▆▇█"


def feature_panel(
    summary: FeatureSummary, examples: Sequence[TopExample], edges: Sequence[float] | None
) -> RenderableType:
    """Everything that is known of a feature, in a frame."""
    parts: list[RenderableType] = [*_label_lines(summary), _statistics(summary, edges)]
    if examples:
        parts += [Text(), _contexts(examples, summary.max)]
    title = Text(f"feature {summary.feature_id}", style="bold")
    return Panel(Group(*parts), title=title, title_align="left", border_style="cyan")


def label_text(label: str, model_name: str | None) -> Text:
    """A label with its origin."""
    origin = "counted" if model_name == "statistics" else f"by {model_name or 'unknown'}"
    # Text, not markup: a label may hold square brackets.
    return Text.assemble((visible(label), "bold"), (f"  ({visible(origin)})", "dim"))


def heat(context: TopExample, scale: float) -> Text:
    """The context, each token's background by its strength relative to ``scale``."""
    text = Text(no_wrap=False)
    for token in context.context:
        piece = f"[{token.token}]" if token.text is None else visible(token.text)
        style = ""
        if token.strength > 0 and scale > 0:
            level = min(int(token.strength / scale * len(_HEAT)), len(_HEAT) - 1)
            style = f"black on {_HEAT[level]}"
        if token.token_idx == context.token_idx:
            # Marked by signs too, for terminals and files without colour.
            piece, style = f"«{piece}»", f"{style} bold"
        text.append(piece, style=style.strip() or None)
    return text


def sparkline(histogram: Sequence[int], edges: Sequence[float]) -> str:
    """The part of a histogram that holds anything, a character a bin, with its ends."""
    filled = [i for i, count in enumerate(histogram) if count]
    if not filled:
        return ""
    low, high = filled[0], filled[-1]
    largest = max(histogram)
    bars = "".join(
        # A bin that holds anything shows at least the lowest bar.
        _BARS[-(-count * (len(_BARS) - 1) // largest)]
        for count in histogram[low : high + 1]
    )
    return f"{edges[low]:.3g} {bars} {edges[high + 1]:.3g}"


def _label_lines(summary: FeatureSummary) -> list[Text]:
    if not summary.labels:
        return [Text("no label", style="dim")]
    return [label_text(label.label, label.model_name) for label in summary.labels]


def _statistics(summary: FeatureSummary, edges: Sequence[float] | None) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    share = "" if summary.density is None else f" ({summary.density:.3%} of tokens)"
    table.add_row("active on", f"{summary.count:,} tokens{share}")
    if summary.count:
        mean = "" if summary.mean is None else f", mean {summary.mean:.4g}"
        table.add_row("strength", f"max {summary.max:.4g}{mean}")
    known = {name: d for name, d in summary.segment_density.items() if d is not None}
    if summary.count and known:
        table.add_row("density", ", ".join(f"{name} {d:.3%}" for name, d in known.items()))
    if summary.count and summary.histogram is not None and edges is not None:
        table.add_row("histogram", sparkline(summary.histogram, edges))
    return table


def _contexts(examples: Sequence[TopExample], scale: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("strength", justify="right", style="green", no_wrap=True)
    table.add_column("sequence:place", style="dim", no_wrap=True)
    table.add_column("context", overflow="fold")
    for example in examples:
        place = f"{example.sequence_id}:{example.token_idx}"
        table.add_row(f"{example.strength:.4g}", place, heat(example, scale))
    return table
