"""Reading what a model answered: reasoning stripped, then the label or the list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

MAX_LABEL = 500
"""Characters. A longer one is no label, whatever it is."""

_OPENS = re.compile(r"\s*<(think|thinking|reasoning)>", re.IGNORECASE)
_CLOSES = re.compile(r"</(think|thinking|reasoning)>", re.IGNORECASE)
_LABEL = re.compile(
    r"^[ \t>*_#`]*label[ \t*_`]*[:\uff1a](?:\*\*(?=\s))?[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE
)
_LIST = re.compile(r"\[[^\[\]]*\]")


def without_reasoning(text: str) -> Iterator[str]:
    """What may be the answer in ``text``, the likeliest first; nothing where it only reasons.

    R1 writes ``<think>...</think>answer``, or leaves the first tag to its chat template. A label
    may well speak of the tag itself ("the end of thinking, </think>"), so the text is cut at the
    first closing tag, and without an opening one it is also read as a whole.
    """
    opened, closed = _OPENS.match(text), _CLOSES.search(text)
    if closed:
        yield text[closed.end() :]
    if not opened:
        yield text


def read_label(text: str) -> str | None:
    """The label of the last line that begins with ``LABEL:``; None where there is none.

    As given, but for the blanks and quotes around it.
    """
    for answer in without_reasoning(text):
        found = [match.group(1) for match in _LABEL.finditer(answer)]
        if found:
            label = found[-1].strip()
            if label.endswith("**") and label.count("**") % 2:  # of **LABEL: ...**
                label = label[:-2].strip()
            if len(label) > 2 and label[0] == label[-1] == '"' and '"' not in label[1:-1]:
                label = label[1:-1].strip()
            return label if 0 < len(label) <= MAX_LABEL else None
    return None


def read_list(text: str, count: int) -> tuple[bool, ...] | None:
    """The last list of ``count`` zeros and ones; None where there is none.

    A list of another length after it makes the answer unreadable: no guess is taken.
    """
    for answer in without_reasoning(text):
        found = [values for m in _LIST.finditer(answer) if (values := _bits(m.group())) is not None]
        if found:
            return found[-1] if len(found[-1]) == count else None
    return None


def _bits(text: str) -> tuple[bool, ...] | None:
    try:
        values = json.loads(text.lower())  # True and true
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or not values:
        return None
    if any(not isinstance(value, (int, bool)) or value not in (0, 1) for value in values):
        return None
    return tuple(bool(value) for value in values)
