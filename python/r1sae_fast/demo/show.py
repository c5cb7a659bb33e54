"""The demo's findings in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from r1sae_fast.demo.display import WIDTH
from r1sae_fast.demo.findings import Context, Feature, Findings, Piece, Trace
from r1sae_fast.features.results import ContextToken, TopExample
from r1sae_fast.features.show import heat
from r1sae_fast.features.text import visible

if TYPE_CHECKING:
    from r1sae_fast.demo.stages import Demo

MOMENT_NAMES = {
    "result": "at the step's result",
    "check": "at the check's result",
    "compare": "before the difference",
    "verdict": "after the difference",
}
_MOMENT_SIGNS = dict(zip(MOMENT_NAMES, "①②③④", strict=True))
_MOMENT_PLACES = (
    ("First, 34 plus 7 is 42", "result"),
    (". Check: 34 plus 7 is 41", "check"),
    (". Compare: 42 minus 41 is", "compare"),
    (" 1.", "verdict"),
    (" Wait", None),
)
_NUMBER_WIDTH = 6
_SEGMENT_STYLES = {"prompt": "dim", "thinking": "", "response": "green"}
_MARK_STYLES = {"wrong": "bold white on red", "wait": "bold black on yellow"}


def show_header(console: Console, demo: Demo) -> None:
    """What this is and where it goes."""
    way = "TinyR1 reasons → residual stream → sparse autoencoder → features → database"
    where = Text.assemble("everything goes to ", (f"{demo.folder}/", "bold"))
    console.print(Panel(Group(Text(way), where), title="r1sae demo", width=_width(console)))


def show_findings(console: Console, findings: Findings, demo: Demo, seconds: float) -> None:
    """Everything, from the trace to how to go on."""
    width = _width(console)
    parts = [
        *_trace_part(findings),
        *_sae_part(findings),
        *_features_part(findings, width),
        *_detector_part(findings, width),
        *_next_part(findings, demo, seconds),
    ]
    for part in parts:
        console.print(part, width=width)


def _width(console: Console) -> int:
    return min(console.width, WIDTH)


def _heading(title: str) -> RenderableType:
    return Padding(Rule(Text(title, style="bold cyan"), align="left"), (1, 0, 0, 0))


def _grid() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    return table


def _trace_part(findings: Findings) -> list[RenderableType]:
    trace, reasoning = findings.trace, findings.reasoning
    if trace is None:
        return []
    whose = "TinyR1 slips and notices" if trace.own else "A planted slip, and its correction"
    legend = Text.assemble(
        ("prompt", "dim"), "  thinking  ", ("answer", "green"), "  ",
        (" wrong result ", _MARK_STYLES["wrong"]), "  ", (" Wait ", _MARK_STYLES["wait"]),
    )  # fmt: skip
    parts: list[RenderableType] = [
        _heading(whose),
        Panel(trace_text(trace.pieces), subtitle=legend, box=box.ROUNDED, border_style="dim"),
    ]
    if reasoning["steps"]:
        parts.append(
            Text(
                f"Sampled at temperature 1, {reasoning['wrong_steps']:.0f} of its "
                f'{reasoning["steps"]:.0f} steps were wrong. "Wait" followed '
                f"{reasoning['waited_after_wrong']:.0%} of these and "
                f"{reasoning['waited_after_right']:.1%} of the right ones.",
                style="dim",
            )
        )
    return parts


def trace_text(pieces: list[Piece]) -> Text:
    """A trace, coloured by segment; slips and "Wait" stand out."""
    text = Text()
    for piece in pieces:
        style = _MARK_STYLES.get(piece.mark) or _SEGMENT_STYLES.get(piece.segment, "")
        # The space before a marked word is not part of what is marked.
        bare = piece.text.lstrip(" ") if piece.mark else piece.text
        text.append(piece.text[: len(piece.text) - len(bare)])
        # Another model's tokens may hold anything; only line breaks reach the terminal as they are.
        text.append("\n".join(map(visible, bare.split("\n"))), style=style or None)
    text.rstrip()
    return text


def _sae_part(findings: Findings) -> list[RenderableType]:
    sae = findings.sae
    table = _grid()
    table.add_row("features", f"{sae['d_sae']:,.0f}", f"of {sae['d_in']:.0f} numbers a token")
    table.add_row("FVU", f"{sae['fvu']:.4f}", f"{1 - sae['fvu']:.1%} of the variance is explained")
    table.add_row("L0", f"{sae['l0']:.2f}", f"features a token, above {sae['threshold']:.3g}")
    table.add_row(
        "dead", f"{sae['dead_in_corpus']:.1%}", f"silent on all {sae['corpus_rows']:,.0f} tokens"
    )
    table.add_row(
        "batch top-k", f"{sae['fvu_batch_topk']:.4f}", f"FVU at L0 {sae['l0_batch_topk']:.2f}"
    )
    note = f"FVU and L0 on {sae['rows']:,.0f} tokens of traces that it was not trained on"
    if sae["left_out"]:
        note += f" ({sae['left_out']:,.0f} outlier rows, such as sinks, left out)"
    return [_heading("The sparse autoencoder"), table, Text(note + ".", style="dim")]


def _features_part(findings: Findings, width: int) -> list[RenderableType]:
    if not findings.features:
        return []
    parts: list[RenderableType] = [_heading("Features with the clearest meaning")]
    parts += [feature_lines(feature, width) for feature in findings.features]
    return parts


def feature_lines(feature: Feature, width: int) -> RenderableType:
    """A feature's label and its strongest contexts, a line each, within ``width`` cells."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(justify="right", style="bold", no_wrap=True, width=_NUMBER_WIDTH)
    table.add_column(overflow="fold")
    title = Text.assemble((feature.label, "bold"), (f"  {feature.density:.2%} of tokens", "dim"))
    table.add_row(f"#{feature.feature}", title)
    for context in feature.contexts:
        table.add_row("", heated(feature, context, width - _NUMBER_WIDTH - 2))
    return table


def heated(feature: Feature, context: Context, width: int) -> Text:
    """A context as ``r1sae features`` shows it, of as many tokens as ``width`` has room for."""
    first, end = _around(context, width)
    tokens = tuple(
        ContextToken(place, -1, context.tokens[place], context.strengths[place], None)
        for place in range(first, end)
    )
    strength = context.strengths[context.hit]
    example = TopExample(feature.feature, 1, 0, context.hit, strength, tokens)
    return heat(example, feature.largest)


def _around(context: Context, width: int) -> tuple[int, int]:
    """The tokens about the one that counts, added in turns before and after it while they fit."""
    cells = [cell_len(visible(token)) for token in context.tokens]
    first, end = context.hit, context.hit + 1
    left = width - cells[context.hit] - len("«»")
    while True:
        before = first > 0 and cells[first - 1] <= left
        if before:
            first -= 1
            left -= cells[first]
        after = end < len(cells) and cells[end] <= left
        if after:
            left -= cells[end]
            end += 1
        if not (before or after):
            return first, end


def _detector_part(findings: Findings, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = [_heading("Which feature knows that a step is wrong?")]
    if not findings.detectors:
        return [*parts, Text("Too few steps to say; run the demo at full scale.", style="dim")]
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold",
    )
    table.add_column("asked", no_wrap=True)
    table.add_column("feature", justify="right", style="bold", no_wrap=True)
    table.add_column("AUROC (95%)", justify="right", no_wrap=True)
    table.add_column("own\nslips", justify="right", no_wrap=True)
    table.add_column("probe", justify="right", style="dim", no_wrap=True)
    table.add_column("fires:\nwrong/right", justify="right", no_wrap=True)
    for one in findings.detectors:
        own = "-" if one.own_auroc is None else f"{one.own_auroc:.3f}"
        table.add_row(
            f"{_MOMENT_SIGNS[one.moment]} {MOMENT_NAMES[one.moment]}",
            f"#{one.feature}",
            Text.assemble((f"{one.auroc:.3f}", "bold"), f" ({one.low:.3f}-{one.high:.3f})"),
            own,
            f"{one.probe_auroc:.3f}",
            f"{one.fires_on_wrong:.0%}/{one.fires_on_right:.1%}",
        )
    first = findings.detectors[findings.headline]
    note = (
        f"Held-out traces with planted slips: each feature was chosen on one half of them and is "
        f"measured on the other ({first.wrong} wrong and {first.right} right steps). Probe: a "
        f"linear one on all of the residual. Own slips: the same feature on {first.own_wrong} "
        f"wrong and {first.own_right} right steps that TinyR1 wrote itself."
    )
    places = Text("where: ", style="dim")
    for text, moment in _MOMENT_PLACES:
        places.append(text)
        if moment is not None:
            places.append(_MOMENT_SIGNS[moment], style="bold not dim")
    parts += [table, Text(), places, Text(note, style="dim"), Text()]
    parts += [feature_lines(feature, width) for feature in findings.detector_features]
    return parts


def _next_part(findings: Findings, demo: Demo, seconds: float) -> list[RenderableType]:
    number = findings.first.feature if findings.first else 0
    ways = {
        str(demo.picture): "training curve, densities, the detector",
        str(demo.report): "all of this as a page; the figures are in summary.json",
        f"r1sae features show {demo.database} {number}": "a feature, in full",
        f'r1sae features search {demo.database} "Wait"': "features by label or token",
        "r1sae tiny-r1 solve --temperature 1": "more of its thoughts",
    }
    # Below one another: a long path leaves no room beside it, and is to be copied in one piece.
    lines = [
        Text.assemble((way, "bold"), "\n  ", (what, "dim"), overflow="fold")
        for way, what in ways.items()
    ]
    done = Text(f"Done in {seconds:.0f} s.", style="bold")
    return [_heading("Go on"), *lines, Text(), done]


__all__ = ["MOMENT_NAMES", "Trace", "show_findings", "show_header", "trace_text"]
