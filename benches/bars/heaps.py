"""P5: heaps from code shards, beside plain reading of the same bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from bars.report import Bar, Section
from bars.shards import warm
from harness.shapes import Shape
from harness.timing import Budget, in_turns
from r1sae_fast import SparseCodes
from r1sae_fast.examples import collect_examples
from r1sae_fast.shards import CodeShards, CodeWriter

N = 20
CHUNK = 1 << 15
REPEATS = 8
"""How often the long stream lists each shard: what its rows take beyond the first time is the
steady state, in which samples are full and few heaps change."""


def write_codes(folder: Path, shape: Shape, rows: int) -> None:
    """Frequent and rare features, strengths of a long tail above a threshold, as the k largest of a
    trained SAE's are; a chunk's features are rotated to make the next one's."""
    generator = torch.Generator().manual_seed(0)
    k, d_sae = shape.k, shape.d_sae
    rank = torch.rand(CHUNK, k, generator=generator).pow(2) * (d_sae // k)
    # Each of k groups of features gives one; which of them is how strong differs from row to row.
    groups = torch.rand(CHUNK, k, generator=generator).argsort(dim=1)
    features = (rank.long() * k + groups).reshape(-1)
    # Sorted exponentials by way of the steps between them, the larger ones first: no ties, however
    # they are scaled.
    steps = torch.empty(CHUNK, k).exponential_(1.0, generator=generator) / torch.arange(k, 0, -1)
    values = (0.3 + (steps + 1e-4).cumsum(dim=1)).flip(1).contiguous()
    offsets = torch.arange(0, CHUNK * k + 1, k)
    with CodeWriter(folder, d_sae, rows_per_shard=1 << 18) as writer:
        for number in range(-(-rows // CHUNK)):
            # Later chunks are a little weaker: a stream whose maxima rise for ever is no steady
            # state, nor is one that repeats itself.
            strengths = values * (1 - 1e-4 * number)
            indices = ((features + 7 * number) % d_sae).int()
            writer.write(SparseCodes(strengths.reshape(-1), indices, offsets, d_sae))


def prepare(folder: Path, shape: Shape, rows: int) -> Path:
    """The folder of the shards, written unless they are there."""
    codes = folder / f"codes-v2-{rows}-{shape.d_sae}-{shape.k}"
    if not codes.exists():
        write_codes(codes, shape, rows)
    return codes


def prepare_long(codes: Path) -> Path:
    """A folder that lists each shard of another :data:`REPEATS` times (as links), so that there are
    rows enough for a steady state, in as much page cache."""
    folder = codes.with_name(f"{codes.name}-x{REPEATS}")
    if folder.exists():
        return folder
    header, *lines = (codes / "manifest.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines] * REPEATS
    folder.mkdir()
    for number, entry in enumerate(listed):
        source, entry = codes / entry["file"], {**entry, "file": f"shard-{number:06d}.safetensors"}
        os.link(source, folder / entry["file"])
        header += "\n" + json.dumps(entry)
    (folder / "manifest.jsonl").write_text(header + "\n")
    return folder


def read_all(folder: Path) -> int:
    """Every byte of the shards through the page cache, summed with torch's threads."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        words = path.stat().st_size // 8
        total += int(torch.from_file(str(path), size=words, dtype=torch.int64).sum())
    return total


def heaps(folder: Path, shape: Shape, rows: int, rounds: int) -> Section:
    """All the shards from nothing, and the steady state behind them."""
    codes = prepare(folder, shape, rows)
    shards, long = CodeShards(codes), CodeShards(prepare_long(codes))
    activations = shards.nnz
    threads = torch.get_num_threads()
    warm(*shards.paths)
    result = in_turns(
        f"P5 heaps of {activations / 1e6:.0f} M activations, n={N}",
        {
            "ours": lambda: collect_examples(shards, N, threads=threads, progress=False),
            "without_samples": lambda: collect_examples(
                shards, N, samples=0, threads=threads, progress=False
            ),
            f"times_{REPEATS}": lambda: collect_examples(long, N, threads=threads, progress=False),
            "reading": lambda: read_all(codes),
        },
        Budget(rounds=rounds),
    )
    result.work = (activations, "activations")
    steady = (result.median(f"times_{REPEATS}") - result.median()) / (REPEATS - 1)
    return Section(
        [result],
        [
            Bar(
                "P5",
                "heaps from code shards, the first rows",
                activations / result.median() / 1e9,
                1.0,
                unit="G activations/s",
            ),
            Bar("P5", "steady state", activations / steady / 1e9, 1.0, unit="G activations/s"),
            Bar(
                "P5",
                "steady state, share of the read bandwidth",
                result.median("reading") / steady,
                0.6,
                unit="of it",
            ),
        ],
    )
