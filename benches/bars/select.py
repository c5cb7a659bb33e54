"""P4: top-k of rows and of batches."""

from __future__ import annotations

import torch

from bars.report import Bar, Section
from harness.shapes import Shape
from harness.timing import Budget, in_turns
from r1sae_fast.ops import batch_topk, topk


def select(shape: Shape, rounds: int) -> Section:
    """On pre-activations as they come: normal ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.rows, shape.d_sae, generator=generator)
    k, words = shape.k, x.view(torch.int64)
    rows = in_turns(
        f"P4 row top-k, {shape.rows} x {shape.d_sae}, k={k}",
        {
            "ours": lambda: topk(x, k),
            "torch_topk": lambda: torch.topk(x, k),
            # What any selection takes at least: every number read once.
            "reading": lambda: words.sum(),
        },
        Budget(rounds=rounds),
    )
    assert torch.equal(topk(x, k).values.reshape(-1, k), torch.topk(x, k).values)
    flat = x.reshape(-1)
    batch = in_turns(
        f"P4 batch top-k, {shape.rows} x {shape.d_sae}, k={k}",
        {"ours": lambda: batch_topk(x, k), "torch_topk": lambda: flat.topk(k * len(x))},
        Budget(rounds=rounds),
    )
    us_a_row = rows.median() / shape.rows * 1e6
    return Section(
        [rows, batch],
        [
            Bar("P4", "row top-k", us_a_row, most=6.0, unit="us a row"),
            Bar("P4", "row top-k, of the speed of reading", rows.ratio("reading"), 0.8),
            Bar("P4", "batch top-k beside torch.topk", batch.ratio("torch_topk"), 30.0),
        ],
    )
