"""A feature as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from r1sae_fast.features.page.style import escaped, framed
from r1sae_fast.features.results import TopExample
from r1sae_fast.features.show import score_words
from r1sae_fast.features.summary import Label
from r1sae_fast.features.text import quoted
from r1sae_fast.features.view import FeatureView, Related

_FAINTEST, _FULLEST = 0.12, 0.75  # of the heat's orange; at both, text stands out on any ground
_WIDTH, _HEIGHT = 420, 70  # of the histogram, in pixels


def feature_html(view: FeatureView) -> str:
    """Everything that is known of a feature."""
    summary = view.summary
    parts = [f"<h3>feature {summary.feature_id}</h3>"]
    parts += [_label(label) for label in summary.labels] or ['<p class="r1-dim">no label</p>']
    parts.append(_statistics(view))
    if summary.count and summary.histogram is not None and view.edges is not None:
        parts.append(histogram_svg(summary.histogram, view.edges))
    if view.examples:
        parts += ["<h4>strongest</h4>", _contexts(view.examples, summary.max)]
    for interval in reversed(view.intervals):
        parts.append(
            f"<h4>interval {interval.number + 1} <span class='r1-dim'>{interval.low:.3g} to "
            f"{interval.high:.3g}, {interval.count:,} activations</span></h4>"
        )
        parts.append(_contexts(interval.examples, summary.max))
    columns = [
        f"<div><h4>{title}</h4>{_related(related, unit)}</div>"
        for title, unit, related in (
            ("nearest decoder directions", "cosine", view.neighbours),
            ("active together", "PMI, bits", view.coactivations),
        )
        if related
    ]
    if columns:
        parts.append(f'<div class="r1-columns">{"".join(columns)}</div>')
    return framed("".join(parts))


def context_html(example: TopExample, scale: float) -> str:
    """The tokens around a place, each one's background by its strength relative to ``scale``."""
    pieces = []
    segment: str | None = None
    for token in example.context:
        if token.segment != segment and token.segment is not None:
            pieces.append(f'<span class="r1-segment">{escaped(token.segment)}</span>')
        segment = token.segment
        text = f"[{token.token}]" if token.text is None else token.text
        style = kind = title = ""
        if token.strength > 0 and scale > 0:
            alpha = _FAINTEST + (_FULLEST - _FAINTEST) * min(token.strength / scale, 1.0)
            style = f' style="background:rgba(255,120,0,{alpha:.2f})"'
            title = f' title="{token.strength:.4g}"'
        if token.token_idx == example.token_idx:
            kind = ' class="r1-peak"'
        piece = escaped(text)
        pieces.append(f"<span{kind}{style}{title}>{piece}</span>" if kind or style else piece)
    return "".join(pieces)


def histogram_svg(histogram: Sequence[int], edges: Sequence[float]) -> str:
    """The part of a histogram that holds anything, as bars."""
    filled = [i for i, count in enumerate(histogram) if count]
    if not filled:
        return ""
    low, high = filled[0], filled[-1]
    largest, step = max(histogram), _WIDTH / (high - low + 1)
    bars = "".join(
        f'<rect x="{(i - low) * step:.1f}" y="{_HEIGHT - height:.1f}" '
        f'width="{max(step - 1, 0.5):.1f}" height="{height:.1f}">'
        f"<title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {histogram[i]:,}</title></rect>"
        for i in range(low, high + 1)
        if (height := max(histogram[i] / largest * _HEIGHT, 1.0 if histogram[i] else 0.0))
    )
    text = 'font-size="11" fill="currentColor" opacity="0.75"'
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT + 18}" role="img" '
        f'aria-label="histogram of strengths"><g fill="rgb(232,110,30)">{bars}</g>'
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}" stroke="currentColor" '
        f'opacity="0.5"/><text x="0" y="{_HEIGHT + 13}" {text}>{edges[low]:.3g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 13}" text-anchor="end" {text}>'
        f"{edges[high + 1]:.3g}</text></svg>"
    )


def _label(label: Label) -> str:
    origin = "counted" if label.statistical else f"by {label.model_name or 'unknown'}"
    words = score_words(label)
    score = f" · {words}" if words else ""
    return (
        f"<p><b>{escaped(label.label)}</b> "
        f'<span class="r1-dim">({escaped(origin)}{escaped(score)})</span></p>'
    )


def _statistics(view: FeatureView) -> str:
    summary = view.summary
    share = "" if summary.density is None else f" ({summary.density:.3%} of tokens)"
    rows = [("active on", f"{summary.count:,} tokens{share}")]
    if summary.count:
        mean = "" if summary.mean is None else f", mean {summary.mean:.4g}"
        rows.append(("strength", f"max {summary.max:.4g}{mean}"))
    known = [(name, d) for name, d in summary.segment_density.items() if d is not None]
    if summary.count and known:
        rows.append(("density", ", ".join(f"{name} {d:.3%}" for name, d in known)))
    if view.tokens:
        tokens = " · ".join(
            f"{quoted(t.text, t.token)} {t.share:.0%}, lift {t.lift:.3g}" for t in view.tokens
        )
        rows.append(("tokens", tokens))
    body = "".join(
        f'<tr><td class="r1-dim r1-name">{name}</td><td class="r1-t">{escaped(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><tbody>{body}</tbody></table>"


def _contexts(examples: Sequence[TopExample], scale: float) -> str:
    rows = "".join(
        f'<tr><td class="r1-n">{e.strength:.4g}</td>'
        f'<td class="r1-n r1-dim">{e.sequence_id}:{e.token_idx}</td>'
        f'<td class="r1-t r1-text">{context_html(e, scale)}</td></tr>'
        for e in examples
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _related(features: Sequence[Related], unit: str) -> str:
    rows = "".join(
        f'<tr><td class="r1-n">{other.feature_id}</td><td class="r1-n">{other.value:.3f}</td>'
        f'<td class="r1-t">{escaped(other.label or "no label")}</td></tr>'
        for other in features
    )
    return (
        f'<table><thead><tr><th class="r1-n">feature</th><th class="r1-n">{unit}</th>'
        f'<th class="r1-t">label</th></tr></thead><tbody>{rows}</tbody></table>'
    )
