"""Selection: the path that users get, its torch reference, and torch.topk as peers use it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r1sae_fast.ops import (
    batch_topk,
    batch_topk_reference,
    threshold,
    threshold_reference,
    topk,
    topk_reference,
)


def plain_topk(pre_activations: Tensor, k: int) -> Tensor:
    """What other libraries run: fast, but with no order among ties."""
    return torch.topk(pre_activations.relu(), k).indices


def plain_batch_topk(pre_activations: Tensor, k: int) -> Tensor:
    """As the release: one top-k over the whole batch."""
    flat = pre_activations.relu().reshape(-1)
    return torch.topk(flat, k * len(pre_activations)).indices


OPERATIONS: dict[str, dict[str, Callable[[Tensor, int], object]]] = {
    "row top-k": {"ours": topk, "torch": topk_reference, "plain_torch": plain_topk},
    "batch top-k": {
        "ours": batch_topk,
        "torch": batch_topk_reference,
        "plain_torch": plain_batch_topk,
    },
    "threshold": {
        "ours": lambda x, k: threshold(x, torch.tensor(2.8)),
        "torch": lambda x, k: threshold_reference(x, torch.tensor(2.8)),
    },
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_select(versus, shape, generator, operation: str) -> None:
    x = torch.randn(shape.rows, shape.d_sae, generator=generator)
    paths = OPERATIONS[operation]
    values, indices, offsets = paths["torch"](x, shape.k)
    ours = paths["ours"](x, shape.k)
    assert torch.equal(ours.indices, indices.to(ours.indices.dtype))
    assert torch.equal(ours.values, values)
    assert torch.equal(ours.row_offsets, offsets)
    calls = {name: lambda path=path: path(x, shape.k) for name, path in paths.items()}
    versus(f"{operation}, {shape.rows} x {shape.d_sae}, k={shape.k}",
           work=(shape.rows, "rows"), **calls)  # fmt: skip
