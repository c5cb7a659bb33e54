"""The demo's findings as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r1sae_fast.atomic import write_bytes
from r1sae_fast.demo.findings import Context, Feature, Findings, Trace
from r1sae_fast.demo.show import MOMENT_NAMES


def write_markdown(findings: Findings, path: Path) -> None:
    """Writes ``report.md``, with the picture beside it."""
    parts = [
        "# What the demo found",
        "![training curve, feature densities, detector](demo.png)",
        _sae(findings),
        *_trace(findings),
        "## Features with the clearest meaning",
        "Labels are counted (on which tokens a feature fires, and how much more often than chance),"
        " not interpreted.",
        *(_feature(feature) for feature in findings.features),
        "## Which feature knows that a step is wrong?",
        *_detectors(findings),
        "## Settings",
        "\n".join(f"- {name}: {value}" for name, value in findings.settings.items()),
    ]
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())


def _sae(findings: Findings) -> str:
    sae = findings.sae
    rows = [
        ("features", f"{sae['d_sae']:.0f}", f"of {sae['d_in']:.0f} numbers a token"),
        ("FVU", f"{sae['fvu']:.4f}", f"on {sae['rows']:.0f} held-out tokens"),
        ("L0", f"{sae['l0']:.2f}", f"codes above the threshold {sae['threshold']:.4g}"),
        ("dead", f"{sae['dead_in_corpus']:.2%}", f"on {sae['corpus_rows']:.0f} corpus tokens"),
        ("FVU, batch top-k", f"{sae['fvu_batch_topk']:.4f}", f"L0 {sae['l0_batch_topk']:.2f}"),
        ("outlier rows", f"{sae['left_out']:.0f}", "left out of these figures"),
    ]
    return "## The sparse autoencoder\n\n" + _table(("", "", ""), rows)


def _trace(findings: Findings) -> list[str]:
    trace, reasoning = findings.trace, findings.reasoning
    if trace is None:
        return []
    title = "TinyR1 slips and notices" if trace.own else "A planted slip, and its correction"
    return [
        f"## {title}",
        _quoted(trace),
        f"Of {reasoning['steps']:.0f} steps sampled at temperature 1, "
        f'{reasoning["wrong_steps"]:.0f} were wrong; "Wait" followed '
        f"{reasoning['waited_after_wrong']:.1%} of these and "
        f"{reasoning['waited_after_right']:.1%} of the right ones.",
    ]


def _quoted(trace: Trace) -> str:
    text = ""
    for piece in trace.pieces:
        bare = piece.text.lstrip(" ")
        space = piece.text[: len(piece.text) - len(bare)]
        bare = bare.replace("<", "&lt;").replace("|", "\\|")
        wrapped = {"wrong": f"~~{bare}~~", "wait": f"**{bare}**"}.get(piece.mark, bare)
        text += space + wrapped
    return "\n".join(f"> {line}" for line in text.strip().split("\n"))


def _feature(feature: Feature) -> str:
    lines = [f"**#{feature.feature}** {feature.label} ({feature.density:.2%} of tokens)", ""]
    lines += [f"- {_context(context)}" for context in feature.contexts]
    return "\n".join(lines)


def _context(context: Context) -> str:
    pieces = [text.replace("\n", "⏎").replace("`", "'") for text in context.tokens]
    before, hit, after = (
        "".join(pieces[: context.hit]),
        pieces[context.hit],
        "".join(pieces[context.hit + 1 :]),
    )
    return f"`{before}`**`{hit}`**`{after}`" if after else f"`{before}`**`{hit}`**"


def _detectors(findings: Findings) -> list[str]:
    if not findings.detectors:
        return ["Too few steps to say."]
    rows = [
        (
            MOMENT_NAMES[one.moment],
            f"#{one.feature}",
            f"{one.auroc:.4f} ({one.low:.4f} to {one.high:.4f})",
            "-" if one.own_auroc is None else f"{one.own_auroc:.4f}",
            f"{one.probe_auroc:.4f}",
            f"{one.fires_on_wrong:.1%} / {one.fires_on_right:.1%}",
        )
        for one in findings.detectors
    ]
    first = findings.detectors[findings.headline]
    header = ("asked", "feature", "AUROC (95%)", "own slips", "linear probe", "fires wrong/right")
    return [
        _table(header, rows),
        f"Slips are planted in written traces of held-out problems. Each feature was chosen on one "
        f"half of these traces and is measured on the other: {first.wrong} wrong and {first.right} "
        f"right steps; intervals by resampling traces. The probe is a ridge regression on the "
        f"residual, fitted and measured on the same halves. Own slips: the same feature on "
        f"{first.own_wrong} wrong and {first.own_right} right steps that TinyR1 wrote itself.",
        *(_feature(feature) for feature in findings.detector_features),
    ]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
