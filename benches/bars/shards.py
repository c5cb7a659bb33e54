"""P6: rows out of activation shards, beside copies of the same rows in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bars.report import Bar, Section
from harness.shapes import Shape
from harness.timing import Budget, in_turns
from r1sae_fast.shards import ActivationShards, ActivationWriter

CHUNK = 1 << 14
BATCH = 4096


def write_rows(folder: Path, d_in: int, rows: int) -> None:
    """Rows of bf16, all different."""
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(CHUNK, d_in, generator=generator).bfloat16()
    with ActivationWriter(folder, d_in, rows_per_shard=1 << 16) as writer:
        for number in range(-(-rows // CHUNK)):
            writer.write(chunk.roll(number, dims=1)[: rows - number * CHUNK])


def prepare(folder: Path, shape: Shape, rows: int) -> tuple[Path, Path]:
    """The folder of the shards and the same rows as one numpy file, written unless there."""
    place, file = folder / f"rows-{rows}-{shape.d_in}", folder / f"rows-{rows}-{shape.d_in}.npy"
    if not place.exists():
        write_rows(place, shape.d_in, rows)
    if not file.exists():
        np.save(file, in_memory(ActivationShards(place)).view(torch.int64).numpy())
    return place, file


def in_memory(shards: ActivationShards) -> Tensor:
    """All rows as one tensor, for the copies to be compared with."""
    rows = torch.empty(len(shards), shards.d_in, dtype=torch.bfloat16)
    for start in range(0, len(shards), CHUNK):
        rows[start : start + CHUNK] = shards[start : start + CHUNK].activations
    return rows


def warm(*files: Path) -> None:
    """Reads files into the page cache: systems drop what nobody has read for a while."""
    block = memoryview(bytearray(1 << 24))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def gathers(folder: Path, shape: Shape, rows: int, rounds: int) -> Section:
    """Batches of a shuffled epoch, and a scan in order, from the loader and by indexing."""
    place, file = prepare(folder, shape, rows)
    shards = ActivationShards(place)
    warm(file, *shards.paths)
    memory = in_memory(shards)
    words = memory.view(torch.int64).numpy()
    mapped = np.load(file, mmap_mode="r")
    chosen = torch.randperm(len(shards), generator=torch.Generator().manual_seed(1))
    batches = torch.split(chosen[: len(chosen) // BATCH * BATCH], BATCH)
    threads = torch.get_num_threads()
    out = np.empty((BATCH, words.shape[1]), words.dtype)
    pool = ThreadPoolExecutor(threads)

    def copy_rows(index: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        np.take(words, index, axis=0, out=target, mode="clip")  # clip: writes without a buffer

    def parallel_copy() -> None:
        """numpy's copy of rows (memcpy each), a share of the batch for each thread."""
        for batch in batches:
            index = np.array_split(batch.numpy(), threads)
            list(pool.map(copy_rows, index, np.array_split(out, threads)))

    loader = shards.loader(BATCH, seed=0, drop_last=True)

    def ours() -> None:
        """An epoch, as training takes it."""
        for _ in loader:
            pass

    def indexed() -> None:
        for batch in batches:
            shards[batch]

    def memmap() -> None:
        for batch in batches:
            mapped[batch.numpy()]

    assert torch.equal(shards[batches[0]].activations, memory[batches[0]])
    calls = {
        "ours": ours,
        "indexed": indexed,
        "parallel_memcpy": parallel_copy,
        "np_memmap": memmap,
    }
    shuffled = in_turns(
        f"P6 shuffled rows of {2 * shape.d_in} bytes, {len(batches)} x {BATCH}",
        calls,
        Budget(rounds=rounds),
    )
    shuffled.work = (len(batches) * BATCH * shape.d_in * 2, "B")
    target = torch.empty_like(memory[:CHUNK])
    in_order = shards.loader(CHUNK, shuffle=False, drop_last=True)

    def scan() -> None:
        """Each batch in memory of its own, as the copy's."""
        for _ in in_order:
            pass

    def mapped_scan() -> None:
        for start in range(0, len(shards) - CHUNK + 1, CHUNK):
            target.copy_(shards[start : start + CHUNK].activations)

    def memcpy() -> None:
        for start in range(0, len(shards) - CHUNK + 1, CHUNK):
            target.copy_(memory[start : start + CHUNK])

    sequential = in_turns(
        f"P6 sequential, {len(shards)} rows",
        {"ours": scan, "slices_copied": mapped_scan, "memcpy": memcpy},
        Budget(rounds=rounds),
    )
    sequential.work = (len(shards) * shape.d_in * 2, "B")
    pool.shutdown()
    return Section(
        [shuffled, sequential],
        [
            Bar(
                "P6",
                "shuffled, of a parallel memcpy gather",
                shuffled.ratio("parallel_memcpy"),
                0.9,
            ),
            Bar("P6", "shuffled, beside np.memmap", shuffled.ratio("np_memmap"), 2.5),
            Bar("P6", "sequential, of memcpy", sequential.ratio("memcpy"), 0.95),
        ],
    )
