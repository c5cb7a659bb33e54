"""Finds the steps of a trace, and judges them by arithmetic of its own.

A step reads "First, 34 plus 7 is 42. Check: 34 plus 7 is 41. Compare: 42 minus 41 is 1." Whether it
is wrong is computed here from what it claims ("34 plus 7 is 42"), whoever wrote it, model or
generator, and whatever follows.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from r1sae_fast.tiny_r1.problems import DAYS

MOMENTS = ("result", "check", "compare", "verdict")
"""Places in a step, in order: the token of the step's own result; that of the check's result; the
"is" of the comparison, where both stand side by side and their difference comes next; and the full
stop after the difference, where "Wait" is or is not due next."""

_STEP = re.compile(
    r"(?:First|Next), (?P<left>[^.,]+?) is (?P<result>\w+)\. "
    r"Check: [^.,]+? is (?P<check>\w+)\. "
    r"Compare: [^.,]+?(?P<compare> is) \w+(?P<verdict>\.)(?P<wait> Wait\b)?"
)
_SUM = re.compile(r"(\d+) (plus|minus|times) (\d+)")
_DAY = re.compile(rf"(\d+) days after ({'|'.join(DAYS)})")
_HOUR = re.compile(r"(\d+) hours after (\d+)")


@dataclass(frozen=True)
class Step:
    """A step of a trace."""

    left: str
    """What was computed: "34 plus 7"."""
    result: str
    """What it is claimed to be."""
    wrong: bool
    waited: bool
    """Whether "Wait" follows."""
    places: dict[str, int]
    """Index of the token at each of :data:`MOMENTS`."""


def truth(left: str) -> str | None:
    """What ``left`` really is; None for what is no arithmetic of TinyR1's world."""
    if match := _SUM.fullmatch(left):
        a, b = int(match[1]), int(match[3])
        return str({"plus": a + b, "minus": a - b, "times": a * b}[match[2]])
    if match := _DAY.fullmatch(left):
        return DAYS[(DAYS.index(match[2]) + int(match[1])) % len(DAYS)]
    if match := _HOUR.fullmatch(left):
        return str((int(match[2]) + int(match[1]) - 1) % 12 + 1)
    return None


def find_steps(tokens: Sequence[int], decode: Callable[[int], str]) -> list[Step]:
    """The steps of a sequence that can be judged, in order.

    Args:
        tokens: ids of the whole sequence.
        decode: id to text.
    """
    pieces = [decode(token) for token in tokens]
    starts = [0, *accumulate(map(len, pieces))]
    steps = []
    for match in _STEP.finditer("".join(pieces)):
        right = truth(match["left"])
        if right is None:
            continue
        # The last character of a place tells its token: a number carries the space before it.
        places = {name: bisect_right(starts, match.end(name) - 1) - 1 for name in MOMENTS}
        wrong = match["result"] != right
        steps.append(Step(match["left"], match["result"], wrong, bool(match["wait"]), places))
    return steps
