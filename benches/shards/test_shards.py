"""Reading and writing activation shards, against safetensors and torch on the same rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1sae_fast.shards import ActivationShards, ActivationWriter

ROWS, D_IN, BATCH = 1 << 13, 7168, 2048  # 112 MiB in bfloat16


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(scope="module")
def shards(activations: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> ActivationShards:
    folder = tmp_path_factory.mktemp("shards") / "activations"
    with ActivationWriter(folder, D_IN, rows_per_shard=ROWS // 4) as writer:
        writer.write(activations)
    return ActivationShards(folder)


@pytest.fixture(scope="module")
def chosen() -> torch.Tensor:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:BATCH]


@pytest.mark.benchmark(group="a shuffled batch")
def test_gather(
    benchmark: Any, shards: ActivationShards, activations: torch.Tensor, chosen: torch.Tensor
) -> None:
    batch = benchmark(lambda: shards[chosen])
    assert torch.equal(batch.activations, activations[chosen])


@pytest.mark.benchmark(group="a shuffled batch")
def test_torch_indexing(benchmark: Any, activations: torch.Tensor, chosen: torch.Tensor) -> None:
    """The same rows of a tensor that is in memory already."""
    assert benchmark(lambda: activations[chosen]).shape == (BATCH, D_IN)


@pytest.mark.benchmark(group="a slice, summed")
def test_slice(benchmark: Any, shards: ActivationShards, activations: torch.Tensor) -> None:
    expected = activations[:BATCH].sum(dtype=torch.float32)
    found = benchmark(lambda: shards[:BATCH].activations.sum(dtype=torch.float32))
    assert torch.equal(found, expected)


@pytest.mark.benchmark(group="a slice, summed")
def test_safetensors_load(benchmark: Any, shards: ActivationShards) -> None:
    """The first shard, which has BATCH rows, through the safetensors package."""
    path = shards.paths[0]
    expected = shards[:BATCH].activations.sum(dtype=torch.float32)
    found = benchmark(lambda: load_file(path)["activations"].sum(dtype=torch.float32))
    assert torch.equal(found, expected)


@pytest.mark.benchmark(group="an epoch's order")
def test_loader(benchmark: Any, shards: ActivationShards, activations: torch.Tensor) -> None:
    loader = shards.loader(BATCH, seed=0)
    rows = benchmark(lambda: sum(len(batch) for batch in loader))
    assert rows == ROWS


@pytest.mark.benchmark(group="writing 28 MiB")
def test_write(benchmark: Any, activations: torch.Tensor, tmp_path: Path) -> None:
    """Checked for NaN, with a checksum, synced."""
    part = activations[:BATCH]
    folders = iter(range(10**6))

    def write() -> Path:
        folder = tmp_path / str(next(folders))
        with ActivationWriter(folder, D_IN) as writer:
            writer.write(part)
        return folder

    folder = benchmark.pedantic(write, rounds=5)
    assert torch.equal(ActivationShards(folder)[:].activations, part)


@pytest.mark.benchmark(group="writing 28 MiB")
def test_safetensors_save(benchmark: Any, activations: torch.Tensor, tmp_path: Path) -> None:
    """Neither checked nor synced."""
    part = activations[:BATCH].clone()
    benchmark.pedantic(
        lambda: save_file({"activations": part}, tmp_path / "plain.safetensors"), rounds=5
    )
