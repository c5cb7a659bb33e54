"""Activations made of known sparse features, as shards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume
from torch import Tensor

from r1sae_fast.shards import ActivationShards, ActivationWriter
from r1sae_fast.train.losses.base import pre_activations
from r1sae_fast.train.step import Learner


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


def _require_clear(learner: Learner, x: Tensor, dead: Tensor | None = None) -> None:
    """Drops examples in which a choice hangs on the last bits of float32: what exceeds an edge, or
    is the last of the largest, by less than products summed in another order differ by."""
    config, parameters = learner.config, learner.parameters
    pre = pre_activations(parameters, x)
    room = 1e-5 * max(1.0, float(pre.abs().max()))
    edges = [torch.zeros(())]
    if config.mode == "jumprelu":
        theta, half = parameters["log_threshold"].exp(), config.width * x.shape[1] ** 0.5 / 2
        edges += [theta, theta - half, theta + half]
    assume(not any(bool(((pre - edge).abs() < room).any()) for edge in edges))

    def cut(values: Tensor, k: int) -> None:
        """[rows, numbers], of which each row keeps k."""
        if 0 < k < values.shape[1]:
            best = values.relu().topk(k + 1, dim=1).values
            close = (best[:, k - 1] - best[:, k] < room) & (best[:, k - 1] > 0)
            assume(not bool(close.any()))

    if config.mode == "topk":
        cut(pre, config.needed_k)
    elif config.mode in ("batch_topk", "matryoshka"):
        cut(pre.reshape(1, -1), config.needed_k * len(x))
    if dead is not None and len(dead):
        cut(pre[:, dead], min(config.resolved_aux_k(learner.d_in), len(dead)))


@pytest.fixture(scope="session")
def assume_clear() -> Callable[..., None]:
    """Of :func:`_require_clear`."""
    return _require_clear
