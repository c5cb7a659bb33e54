"""Taps: reading and writing at named points inside a running model.

``with engine.tap(Capture("model.layers.2"), AddDirection("model.layers.1", d, 4.0)) as taps: ...``
"""

from r1sae_fast.r1.taps.capture import Capture
from r1sae_fast.r1.taps.edits import AddDirection, Apply, Edit, SetFeatures
from r1sae_fast.r1.taps.points import Point, parse_point
from r1sae_fast.r1.taps.tap import Tap

__all__ = [
    "AddDirection",
    "Apply",
    "Capture",
    "Edit",
    "Point",
    "SetFeatures",
    "Tap",
    "parse_point",
]
