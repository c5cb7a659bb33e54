"""P5: heaps from code shards, beside plain reading of the same bytes."""

from __future__ import annotations

from pathlib import Path

import torch

from bars.report import Bar, Section
from harness.shapes import Shape
from harness.timing import Budget, in_turns
from r1sae_fast import SparseCodes
from r1sae_fast.examples import collect_examples
from r1sae_fast.shards import CodeShards, CodeWriter

N = 20
CHUNK = 1 << 15


def write_codes(folder: Path, shape: Shape, rows: int) -> None:
    """Frequent and rare features, strengths of a long tail; a chunk's features are rotated to make
    the next one's."""
    generator = torch.Generator().manual_seed(0)
    k, d_sae = shape.k, shape.d_sae
    rank = torch.rand(CHUNK, k, generator=generator).pow(2) * (d_sae // k)
    features = (rank.long() * k + torch.arange(k)).reshape(-1)
    # Steps between a row's values, the larger ones first: no ties, however they are scaled.
    steps = torch.empty(CHUNK, k).exponential_(2.0 * k, generator=generator) + 1e-3
    values = steps.sort(dim=1).values.cumsum(dim=1).flip(1).contiguous()
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
    codes = folder / f"codes-{rows}-{shape.d_sae}-{shape.k}"
    if not codes.exists():
        write_codes(codes, shape, rows)
    return codes


def read_all(folder: Path) -> int:
    """Every byte of the shards through the page cache, summed with torch's threads."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        words = path.stat().st_size // 8
        total += int(torch.from_file(str(path), size=words, dtype=torch.int64).sum())
    return total


def heaps(folder: Path, shape: Shape, rows: int, rounds: int) -> Section:
    """Steady state over all the shards."""
    codes = prepare(folder, shape, rows)
    shards = CodeShards(codes)
    activations = shards.nnz
    threads = torch.get_num_threads()
    result = in_turns(
        f"P5 heaps of {activations / 1e6:.0f} M activations, n={N}",
        {
            "ours": lambda: collect_examples(shards, N, threads=threads, progress=False),
            "reading": lambda: read_all(codes),
        },
        Budget(rounds=rounds),
    )
    result.work = (activations, "activations")
    rate = activations / result.median() / 1e9
    share = result.ratio("reading")
    return Section(
        [result],
        [
            Bar("P5", "heaps from code shards", rate, 1.0, unit="G activations/s"),
            Bar("P5", "share of the read bandwidth", share, 0.6, unit="of it"),
        ],
    )
