"""Activations made of known sparse features, as shards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1sae_fast.shards import ActivationShards, ActivationWriter


@pytest.fixture
def directions() -> Tensor:
    """32 unit vectors of 24 numbers: more than dimensions, so none can be told apart linearly."""
    generator = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(32, 24, generator=generator), dim=1)


@pytest.fixture
def make_rows(directions: Tensor) -> Callable[[int], Tensor]:
    """Rows of about two features each, of strength 1 to 2, far from the origin."""

    def make(rows: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        on = torch.rand(rows, 32, generator=generator) < 2 / 32
        strengths = on * (1 + torch.rand(rows, 32, generator=generator))
        noise = 0.01 * torch.randn(rows, 24, generator=generator)
        return strengths @ directions + noise + 3.0

    return make


@pytest.fixture
def shards(tmp_path: Path, make_rows: Callable[[int], Tensor]) -> ActivationShards:
    """20,000 such rows in several shards."""
    return write(tmp_path / "activations", make_rows(20_000))


def write(folder: Path, rows: Tensor) -> ActivationShards:
    """``rows`` as float32 shards of at most 8192 rows; sequences of 100."""
    with ActivationWriter(folder, rows.shape[1], dtype="float32", rows_per_shard=8192) as writer:
        number = torch.arange(len(rows))
        writer.write(rows, sequence_id=number // 100, position=number % 100)
    return ActivationShards(folder)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[Tensor], ActivationShards]:
    """Writes rows to a new folder."""
    count = iter(range(1000))
    return lambda rows: write(tmp_path / f"rows-{next(count)}", rows)
