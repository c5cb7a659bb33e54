"""What a machine is measured to do comes out near what it then does, and nothing is left over."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from r1sae_fast.r1.blocks import Fp8Mode
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.stream.plan import Model, Shape
from r1sae_fast.r1.stream.probe import measure
from r1sae_fast.r1.weights import CheckpointReader


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize(
    ("fp8", "dtype"), [("w8a8", torch.bfloat16), ("dequantize", torch.float32)]
)
def test_speeds_are_numbers(checkpoint: Path, fp8: Fp8Mode, dtype: torch.dtype, layer: int) -> None:
    with CheckpointReader(checkpoint) as reader:
        config = R1Config.from_dict(reader.config)
        model = Model(config, layer, fp8, dtype.itemsize, reader.is_fp8)
        shape = Shape(100, ((4, 20), (2, 10)))
        found = measure(checkpoint, reader, model, shape, dtype, torch.device("cpu"), fp8)
    for name, speed in vars(found).items():
        assert math.isfinite(speed), name
        assert speed > 0, name
