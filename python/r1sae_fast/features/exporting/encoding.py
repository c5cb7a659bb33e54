"""JSON that can do nothing, wherever it is pasted."""

from __future__ import annotations

import json
from typing import Any


def encoded(value: Any) -> bytes:
    """JSON in ASCII, harmless within a page's script too; what is not a number is null."""
    try:
        text = json.dumps(value, allow_nan=False, default=str)
    except ValueError:  # looking at every number takes longer than writing it
        text = json.dumps(_numbers(value), allow_nan=False, default=str)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("ascii")


def _numbers(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(entry) for entry in value]
    return value
