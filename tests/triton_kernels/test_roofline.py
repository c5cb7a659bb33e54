"""The computed floors reach what the design promises (R1's shape, 4,096 rows, an H100)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "benches" / "triton_kernels" / "roofline.py"


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("r1sae_roofline", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_design_floors(roofline: ModuleType) -> None:
    (h100,) = (device for device in roofline.DEVICES if device.name == "H100")
    found = roofline.cells(h100, 4096)
    torch_half, sparsify, flex, ours, torch_float, exact, their_step, our_step = found[:8]
    assert ours <= 3.0 < sparsify < torch_half
    assert ours < flex
    assert exact <= 3.5 < torch_float / 4
    assert our_step <= 0.6 * their_step
    # Reads from the L2 cache counted, half precision and the step hold too; exact float32 doesn't.
    cached_ours, cached_exact, cached_theirs, cached_step = found[9:]
    assert cached_ours <= 3.0
    assert cached_step <= 0.6 * cached_theirs
    assert exact < cached_exact < 25.0


def test_every_device_and_size_has_a_line(roofline: ModuleType) -> None:
    text = "\n".join(roofline.lines())
    assert "computed, not measured" in text
    lines = [line for line in text.splitlines() if line.startswith(("| H", "| B", "| A", "| M"))]
    assert len(lines) == len(roofline.DEVICES) * len(roofline.ROWS) == 25
    assert {len(line.split("|")) for line in lines} == {len(roofline.HEADINGS) + 4}
