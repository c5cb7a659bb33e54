"""Collecting every feature's strongest rows: one bounded pass, beside a sort of all activations."""

from pathlib import Path

import pytest
import torch

from r1sae_fast import SparseCodes
from r1sae_fast.examples import collect_examples
from r1sae_fast.shards import CodeWriter

N = 20
ROWS = {"small": 1 << 14, "r1": 1 << 18}


@pytest.fixture(scope="module")
def codes(shape) -> SparseCodes:
    """Frequent and rare features, strengths of a long tail."""
    rows, k, d_sae = ROWS[shape.name], shape.k, shape.d_sae
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(rows, k, generator=generator).pow(2) * (d_sae // k)
    indices = (rank.long() * k + torch.arange(k)).to(torch.int32)
    values = torch.empty(rows, k).exponential_(2.0, generator=generator) + 0.01
    values = values.sort(dim=1, descending=True).values
    offsets = torch.arange(0, rows * k + 1, k)
    return SparseCodes(values.reshape(-1), indices.reshape(-1), offsets, d_sae)


@pytest.fixture(scope="module")
def folder(codes: SparseCodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "shards"
    with CodeWriter(folder, codes.d_sae) as writer:
        writer.write(codes)
    return folder


def by_sorting(codes: SparseCodes) -> torch.Tensor:
    """The obvious way, not bounded: sort all codes by feature and strength."""
    order = codes.values.argsort(descending=True, stable=True)
    order = order[codes.indices[order].argsort(stable=True)]
    counts = torch.bincount(codes.indices, minlength=codes.d_sae)
    at = (counts.cumsum(0) - counts)[:, None] + torch.arange(N)
    strongest = codes.values[order[at.clamp(max=codes.nnz - 1)]]
    return torch.where(torch.arange(N) < counts[:, None], strongest, 0.0)


@pytest.mark.parametrize("source", ["shards", "memory"])
def test_collect(versus, shape, codes, folder, source) -> None:
    given = folder if source == "shards" else codes
    threads = torch.get_num_threads()
    assert torch.equal(collect_examples(given, N).strengths, by_sorting(codes))
    versus(
        f"examples from {source}, {len(codes.row_offsets) - 1} rows, k={shape.k}, "
        f"d_sae={shape.d_sae}, n={N}",
        ours=lambda: collect_examples(given, N, threads=threads, progress=False),
        torch=lambda: by_sorting(codes),
        work=(codes.nnz, "activations"),
    )
