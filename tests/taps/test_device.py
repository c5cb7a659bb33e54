"""Where no accelerator is at hand, torch's meta device stands for another one."""

from __future__ import annotations

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.taps import AddDirection, Capture, SetFeatures


def test_what_lies_elsewhere_is_refused(engine: LocalEngine, sae: FastSAE) -> None:
    for tap in (Capture(1, sae=sae), SetFeatures(1, sae, {3: 1.0}, mode="relu")):
        elsewhere = FastSAE(48, 80, 6, mode="topk", device="meta")
        tap.sae = elsewhere
        with pytest.raises(ValueError, match=r"the SAE lies on meta, .* use sae.to\('cpu'\)"):
            engine.run([[2, 3]], [tap])
    edit = AddDirection(1, torch.ones(48))
    edit.direction = edit.direction.to("meta")
    with pytest.raises(ValueError, match="direction lies on meta, the engine on cpu"):
        engine.run([[2, 3]], [edit])
