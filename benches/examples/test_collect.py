"""Collecting examples: one pass over codes in memory against a sort of all activations."""

import numpy as np
import pytest
import torch

from r1sae_fast import SparseCodes
from r1sae_fast.examples import collect_examples
from r1sae_fast.ops import topk

ROWS, D_SAE, K, N = 4_096, 4_096, 64, 20


def by_sorting(codes: SparseCodes) -> tuple[np.ndarray, np.ndarray]:
    """Each feature's strongest rows by one sort: feature, falling strength, rising row."""
    rows = np.repeat(np.arange(len(codes.row_offsets) - 1), np.diff(codes.row_offsets.numpy()))
    features, values = codes.indices.numpy(), codes.values.numpy()
    order = np.lexsort((rows, -values, features))
    features, values, rows = features[order], values[order], rows[order]
    place = np.arange(len(features)) - np.searchsorted(features, features)
    kept = place < N
    found = np.full((D_SAE, N), -1, np.int64)
    strengths = np.zeros((D_SAE, N), np.float32)
    found[features[kept], place[kept]] = rows[kept]
    strengths[features[kept], place[kept]] = values[kept]
    return strengths, found


@pytest.mark.parametrize("path", ["sorting", "ours"])
def test_collect(benchmark, generator, path: str) -> None:
    codes = topk(torch.randn(ROWS, D_SAE, generator=generator), K)
    strengths, rows = by_sorting(codes)
    ours = collect_examples(codes, N)
    present = rows >= 0
    assert np.array_equal(np.asarray(ours.rows)[present], rows[present])
    assert np.array_equal(np.asarray(ours.strengths)[present], strengths[present])
    benchmark.group = f"examples, {ROWS} rows, k={K}, d_sae={D_SAE}, n={N}"
    call = by_sorting if path == "sorting" else collect_examples
    arguments = (codes,) if path == "sorting" else (codes, N)
    benchmark.pedantic(call, args=arguments, rounds=5, warmup_rounds=1)
