"""Windows as text for a prompt: one line, marks around tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from r1sae_fast.features.text import visible
from r1sae_fast.labels.windows import Window

MARKS = (("<<", ">>"), ("⟦", "⟧"), ("{{", "}}"), ("⟪", "⟫"))
"""Pairs of marks, the field's own first; another where a text has these itself."""

# What a chat template would take for its own: <|im_end|>, R1's <｜User｜>.
_CONTROL = re.compile(r"<[|\uff5c]([^<>|\uff5c\n]{1,60})[|\uff5c]>")
_LISTED = 10  # strengths below a passage


def choose_marks(windows: Iterable[Window]) -> tuple[str, str]:
    """The first pair of which no window has either; the last where all are in use."""
    text = "\n".join(plain(window) for window in windows)
    return next((pair for pair in MARKS if not any(mark in text for mark in pair)), MARKS[-1])


def plain(window: Window) -> str:
    """The text alone."""
    return _shown("".join(window.texts))


def marked(window: Window, positions: Collection[int], marks: tuple[str, str]) -> str:
    """The text with the tokens at ``positions`` marked, neighbours together."""
    parts, inside = [], False
    for at, text in enumerate(window.texts):
        if (at in positions) != inside:
            inside = not inside
            parts.append(marks[0] if inside else marks[1])
        parts.append(visible(text))
    return _shown("".join(parts) + (marks[1] if inside else ""))


def _shown(text: str) -> str:
    """On one line, nothing invisible, and no token that would end the passage or the turn."""
    return _CONTROL.sub(lambda match: f"⟨{match.group(1)}⟩", visible(text))


def active_positions(window: Window, threshold: float) -> tuple[int, ...]:
    """Where the feature has at least ``threshold`` of the window's largest strength."""
    least = threshold * window.largest
    return tuple(i for i, s in enumerate(window.strengths) if s > 0 and s >= least)


def strengths_line(window: Window, positions: Sequence[int], largest: float) -> str:
    """The marked tokens with their strengths from 1 to 10, ``largest`` being 10."""
    listed = [
        f'"{_shown(window.texts[i])}" {max(1, round(10 * window.strengths[i] / largest))}'
        for i in positions[:_LISTED]
    ]
    more = ", ..." if len(positions) > _LISTED else ""
    return "Strengths: " + ", ".join(listed) + more
