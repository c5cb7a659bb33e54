"""Windows as text for a prompt: one line, marks around tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from r1sae_fast.features.text import visible
from r1sae_fast.labels.windows import Window

MARKS = (("<<", ">>"), ("⟦", "⟧"), ("{{", "}}"), ("⟪", "⟫"))
"""Pairs of marks, the field's own first; another where a text has these itself."""

_LISTED = 10  # strengths below a passage


def choose_marks(windows: Iterable[Window]) -> tuple[str, str]:
    """The first pair of which no window has either; the last where all are in use."""
    text = "\n".join(plain(window) for window in windows)
    return next((pair for pair in MARKS if not any(mark in text for mark in pair)), MARKS[-1])


def plain(window: Window) -> str:
    """The text alone."""
    return visible("".join(window.texts))


def marked(window: Window, positions: Collection[int], marks: tuple[str, str]) -> str:
    """The text with the tokens at ``positions`` marked, neighbours together."""
    parts, inside = [], False
    for at, text in enumerate(window.texts):
        if (at in positions) != inside:
            inside = not inside
            parts.append(marks[0] if inside else marks[1])
        parts.append(visible(text))
    return "".join(parts) + (marks[1] if inside else "")


def active_positions(window: Window, threshold: float) -> tuple[int, ...]:
    """Where the feature has at least ``threshold`` of the window's largest strength."""
    least = threshold * window.largest
    return tuple(i for i, s in enumerate(window.strengths) if s > 0 and s >= least)


def strengths_line(window: Window, positions: Sequence[int], largest: float) -> str:
    """The marked tokens with their strengths from 1 to 10, ``largest`` being 10."""
    listed = [
        f'"{visible(window.texts[i])}" {max(1, round(10 * window.strengths[i] / largest))}'
        for i in positions[:_LISTED]
    ]
    more = ", ..." if len(positions) > _LISTED else ""
    return "Strengths: " + ", ".join(listed) + more
