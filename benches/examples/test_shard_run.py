"""One pass over codes at the size of R1's SAEs: 28,672 features, 64 codes a row, n = 20."""

from pathlib import Path
from typing import Any

import pytest
import torch

from r1sae_fast.codes import SparseCodes
from r1sae_fast.examples import Examples, collect_examples
from r1sae_fast.shards import CodeWriter

D_SAE, K, ROWS, N = 28_672, 64, 1 << 17, 20
GROUP = f"examples, {ROWS} rows, k={K}, d_sae={D_SAE}, n={N}"


@pytest.fixture(scope="module")
def codes() -> SparseCodes:
    """Frequent and rare features, strengths of a long tail."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(ROWS, K, generator=generator).pow(2) * (D_SAE // K)
    indices = (rank.long() * K + torch.arange(K)).to(torch.int32)
    values = torch.empty(ROWS, K).exponential_(2.0, generator=generator) + 0.01
    values = values.sort(dim=1, descending=True).values
    return SparseCodes(
        values.reshape(-1), indices.reshape(-1), torch.arange(0, ROWS * K + 1, K), D_SAE
    )


@pytest.fixture(scope="module")
def folder(codes: SparseCodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "shards"
    with CodeWriter(folder, D_SAE) as writer:
        writer.write(codes)
    return folder


@pytest.fixture(scope="module")
def expected(codes: SparseCodes) -> Examples:
    return collect_examples(codes, N, threads=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_shards(benchmark: Any, folder: Path, expected: Examples, threads: int) -> None:
    benchmark.group = GROUP
    found = benchmark(collect_examples, folder, N, threads=threads)
    assert found.equal(expected)


def test_batches(benchmark: Any, codes: SparseCodes, expected: Examples) -> None:
    batches = [codes[i : i + 4096] for i in range(0, ROWS, 4096)]
    benchmark.group = GROUP
    found = benchmark(collect_examples, batches, N, threads=1)
    assert found.equal(expected)


def test_torch_sort(benchmark: Any, codes: SparseCodes, expected: Examples) -> None:
    """The obvious way, not bounded: sort all codes by feature and strength."""

    def by_sorting() -> torch.Tensor:
        order = codes.values.argsort(descending=True, stable=True)
        order = order[codes.indices[order].argsort(stable=True)]
        counts = torch.bincount(codes.indices, minlength=D_SAE)
        start = counts.cumsum(0) - counts
        at = start[:, None] + torch.arange(N)
        used = torch.arange(N) < counts[:, None]
        strongest = codes.values[order[at.clamp(max=codes.nnz - 1)]]
        return torch.where(used, strongest, 0.0)

    benchmark.group = GROUP
    assert torch.equal(benchmark(by_sorting), expected.strengths)
