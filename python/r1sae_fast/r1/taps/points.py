"""Names of the places in a model where taps read and write."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

PREFIX = "model.layers."
PLACES = {"output": "", "input": ".input", "self_attn": ".self_attn", "mlp": ".mlp"}
_NAME = re.compile(r"model\.layers\.(0|[1-9]\d*)(?:\.(input|output|self_attn|mlp))?")
# What other libraries call them; used only to name the right one.
_OTHERS = {
    "hook_resid_pre": "input",
    "resid_pre": "input",
    "hook_resid_post": "output",
    "resid_post": "output",
    "hook_attn_out": "self_attn",
    "attn": "self_attn",
    "attention": "self_attn",
    "hook_mlp_out": "mlp",
    "ffn": "mlp",
}


class Point(NamedTuple):
    """A place of one block; ``str(point)`` is its name."""

    layer: int
    place: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.layer}{PLACES[self.place]}"


def parse_point(name: str | int) -> Point:
    """The point of that name; a number is the block's output.

    ``model.layers.{i}`` is the residual stream after block i (the hook point of the released
    SAEs), ``model.layers.{i}.input`` the one before it, ``model.layers.{i}.self_attn`` and
    ``model.layers.{i}.mlp`` are what attention and feed-forward add to it.

    Raises:
        ValueError: no such name; the nearest valid one is named.
    """
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        return Point(name, "output")
    if not isinstance(name, str):
        raise ValueError(
            f"point is {name!r}; expected a name such as 'model.layers.3' or a layer's number"
        )
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"there is no point {name!r}; did you mean {_nearest(name)!r}? Points are "
            "model.layers.N (the output of block N), model.layers.N.input, "
            "model.layers.N.self_attn and model.layers.N.mlp"
        )
    return Point(int(match[1]), match[2] or "output")


def _nearest(name: str) -> str:
    numbers = re.findall(r"\d+", name)
    layer = int(numbers[0]) if numbers else 0
    place = _OTHERS.get(name.rsplit(".", 1)[-1])
    if place is not None:
        return str(Point(layer, place))
    valid = [str(Point(layer, place)) for place in PLACES]
    return (difflib.get_close_matches(name, valid, 1, 0.3) or valid)[0]
