"""A feature in the terminal: statistics, labels, examples in heat colours, neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from r1sae_fast.features.results import TopExample
from r1sae_fast.features.text import brief, quoted

if TYPE_CHECKING:
    from r1sae_fast.features.summary import FeatureSummary, Label
    from r1sae_fast.features.view import FeatureView, Interval, Related

# Backgrounds from faint to full strength; on each the text stays readable.
_HEAT = ("#fff3d6", "#ffe0a3", "#ffc266", "#ff9a3d", "#f2622e")
_BARS = " ▁▂▃▄▅▆▇█"


def feature_panel(view: FeatureView, *, marks: bool = False) -> RenderableType:
    """Everything that is known of a feature, in a frame.

    ``marks``: active tokens stand between signs, for terminals and files without colour.
    """
    summary = view.summary
    parts: list[RenderableType] = [*_label_lines(summary), _statistics(view)]
    if view.examples:
        parts += [Text(), _heading("strongest"), _contexts(view.examples, summary.max, marks)]
    for interval in reversed(view.intervals):
        parts += [Text(), _interval_heading(interval)]
        parts.append(_contexts(interval.examples, summary.max, marks))
    for heading, unit, related in (
        ("nearest decoder directions", "cosine", view.neighbours),
        ("active together", "PMI, bits", view.coactivations),
    ):
        if related:
            parts += [Text(), _heading(heading), _related(related, unit)]
    title = Text(f"feature {summary.feature_id}", style="bold")
    return Panel(Group(*parts), title=title, title_align="left", border_style="cyan")


def label_text(label: str, model_name: str | None) -> Text:
    """A label with its origin."""
    origin = "counted" if model_name == "statistics" else f"by {model_name or 'unknown'}"
    # Text, not markup: a label may hold square brackets.
    return Text.assemble((brief(label), "bold"), (f"  ({brief(origin, 100)})", "dim"))


def heat(context: TopExample, scale: float, *, marks: bool = False) -> Text:
    """The context, each token's background by its strength relative to ``scale``.

    The token itself stands «so», with ``marks`` other active ones ‹so›; where one of R1's segments
    begins, its name stands before it.
    """
    text = Text(no_wrap=False)
    segment: str | None = None
    opens = False
    for token in context.context:
        if token.segment != segment and token.segment is not None:
            text.append(f"[{brief(token.segment, 200)}]", style="italic dim")
            opens = True
        segment = token.segment
        piece = f"[{token.token}]" if token.text is None else brief(token.text, 200)
        if opens and not piece.startswith(" "):
            text.append(" ")
        opens = False
        style = ""
        if token.strength > 0 and scale > 0:
            level = min(int(token.strength / scale * len(_HEAT)), len(_HEAT) - 1)
            style = f"black on {_HEAT[level]}"
        if token.token_idx == context.token_idx:
            # Marked by signs too, for terminals and files without colour.
            piece, style = f"«{piece}»", f"{style} bold"
        elif marks and token.strength > 0:
            piece = f"‹{piece}›"
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


def score_words(label: Label) -> str:
    """A label's balanced accuracies (chance: 0.5), with 95% margins; counted ones need none."""
    if label.statistical:
        return ""
    if not label.scores:
        return "not scored"
    words = []
    for score in label.scores:
        name = brief(score.scorer, 200)
        if score.balanced_accuracy is None:
            words.append(f"{name} unanswered")
        else:
            words.append(f"{name} {score.balanced_accuracy:.2f} ± {score.margin or 0:.2f}")
    return ", ".join(words)


def _label_lines(summary: FeatureSummary) -> list[Text]:
    if not summary.labels:
        return [Text("no label", style="dim")]
    lines = []
    for label in summary.labels:
        line = label_text(label.label, label.model_name)
        words = score_words(label)
        if words:
            line.append(f"  [{words}]", style="dim" if not label.scores else "green")
        lines.append(line)
    return lines


def _heading(title: str) -> Text:
    return Text(title, style="cyan bold")


def _interval_heading(interval: Interval) -> Text:
    return Text.assemble(
        (f"interval {interval.number + 1}", "cyan bold"),
        (f"  {interval.low:.3g} to {interval.high:.3g}, {interval.count:,} activations", "dim"),
    )


def _statistics(view: FeatureView) -> Table:
    summary = view.summary
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
    if summary.count and summary.histogram is not None and view.edges is not None:
        table.add_row("histogram", sparkline(summary.histogram, view.edges))
    if view.tokens:
        words = Text()
        for token in view.tokens:
            words.append(("   " if words else "") + quoted(token.text, token.token))
            words.append(f" {token.share:.0%}, lift {token.lift:.3g}", style="dim")
        table.add_row("tokens", words)
    return table


def _contexts(examples: Sequence[TopExample], scale: float, marks: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("strength", justify="right", style="green", no_wrap=True)
    table.add_column("sequence:place", style="dim", no_wrap=True)
    table.add_column("context", overflow="fold")
    for example in examples:
        place = f"{example.sequence_id}:{example.token_idx}"
        table.add_row(f"{example.strength:.4g}", place, heat(example, scale, marks=marks))
    return table


def _related(features: Sequence[Related], unit: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("feature", justify="right", no_wrap=True)
    table.add_column(unit, justify="right", style="green", no_wrap=True)
    table.add_column("label", overflow="fold")
    for other in features:
        label = Text("no label", style="dim")
        if other.label is not None:
            label = label_text(other.label, other.model_name)
        table.add_row(str(other.feature_id), f"{other.value:.3f}", label)
    return table
