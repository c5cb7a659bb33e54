"""Activation shards: shuffled batches, scans and writing, beside torch on rows in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from r1sae_fast.shards import ActivationShards, ActivationWriter

ROWS = {"small": 1 << 14, "r1": 1 << 16}
BATCH = 2048


@pytest.fixture(scope="module")
def activations(shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS[shape.name], shape.d_in, generator=generator).bfloat16()


@pytest.fixture(scope="module")
def shards(activations, tmp_path_factory: pytest.TempPathFactory) -> ActivationShards:
    folder = tmp_path_factory.mktemp("shards") / "activations"
    rows, d_in = activations.shape
    with ActivationWriter(folder, d_in, rows_per_shard=rows // 4) as writer:
        writer.write(activations)
    return ActivationShards(folder)


@pytest.fixture(scope="module")
def mapped(activations, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The same rows as np.memmap has them."""
    path = tmp_path_factory.mktemp("plain") / "rows.npy"
    np.save(path, activations.view(torch.int16).numpy())
    return np.load(path, mmap_mode="r")


def size(activations: torch.Tensor, rows: int) -> tuple[float, str]:
    return rows * activations.shape[1] * activations.element_size(), "B"


def test_gather(versus, shards, activations, mapped) -> None:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(len(activations), generator=generator)[:BATCH]
    index = chosen.numpy()
    assert torch.equal(shards[chosen].activations, activations[chosen])
    versus(
        f"{BATCH} shuffled rows of {2 * activations.shape[1]} bytes",
        ours=lambda: shards[chosen],
        torch=lambda: activations[chosen],
        np_memmap=lambda: mapped[index],
        work=size(activations, BATCH),
    )


def test_epoch(versus, shards, activations) -> None:
    loader = shards.loader(BATCH, seed=0)
    order = torch.randperm(len(activations))

    def ours() -> int:
        return sum(len(batch) for batch in loader)

    def in_memory() -> int:
        return sum(len(activations[chosen]) for chosen in order.split(BATCH))

    assert ours() == in_memory() == len(activations)
    versus(
        f"an epoch of {len(activations)} shuffled rows",
        ours=ours,
        torch=in_memory,
        work=size(activations, len(activations)),
    )


def test_scan(versus, shards, activations) -> None:
    """Both have each batch in memory of its own."""
    loader = shards.loader(BATCH, shuffle=False)
    parts = [slice(start, start + BATCH) for start in range(0, len(activations), BATCH)]
    target = torch.empty_like(activations[:BATCH])
    assert all(
        torch.equal(batch.activations, activations[part])
        for batch, part in zip(loader, parts, strict=True)
    )
    versus(
        f"a scan of {len(activations)} rows, copied out",
        ours=lambda: [len(batch) for batch in loader],
        torch=lambda: [target.copy_(activations[part]) for part in parts],
        slices=lambda: [target.copy_(shards[part].activations) for part in parts],
        work=size(activations, len(activations)),
    )


def test_write(versus, activations, tmp_path: Path) -> None:
    """Ours checks for NaN, computes a checksum and syncs; safetensors alone does none of it."""
    part = activations[:BATCH].clone()
    numbers = iter(range(10**6))

    def write() -> Path:
        folder = tmp_path / str(next(numbers))
        with ActivationWriter(folder, part.shape[1]) as writer:
            writer.write(part)
        return folder

    assert torch.equal(ActivationShards(write())[:].activations, part)
    versus(
        f"writing {BATCH} rows of {2 * part.shape[1]} bytes",
        ours=write,
        torch=lambda: save_file({"activations": part}, tmp_path / "plain.safetensors"),
        work=size(part, BATCH),
        rounds=10,
        compared=False,  # the disk's time to sync
    )
