"""Selection: the torch reference, torch.topk as peers use it, and the path that users get."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r1sae_fast.ops import batch_topk, batch_topk_reference, topk, topk_reference

ROWS, D_SAE, K = 64, 28_672, 128


def plain_topk(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What other libraries run: fast, but with no order among ties."""
    values, indices = torch.topk(pre_activations.relu(), k)
    return values, indices


PATHS: dict[str, dict[str, Callable[[Tensor, int], object]]] = {
    "row top-k": {"reference": topk_reference, "torch.topk": plain_topk, "ours": topk},
    "batch top-k": {"reference": batch_topk_reference, "ours": batch_topk},
}


@pytest.mark.parametrize(
    ("operation", "path"), [(name, path) for name, paths in PATHS.items() for path in paths]
)
def test_select(benchmark, generator, operation: str, path: str) -> None:
    x = torch.randn(ROWS, D_SAE, generator=generator)
    paths = PATHS[operation]
    values, indices, offsets = paths["reference"](x, K)
    ours = paths["ours"](x, K)
    assert torch.equal(ours.indices, indices.to(ours.indices.dtype))
    assert torch.equal(ours.values, values)
    assert torch.equal(ours.row_offsets, offsets)
    benchmark.group = f"{operation}, {ROWS} x {D_SAE}, k={K}"
    benchmark.pedantic(paths[path], args=(x, K), rounds=7, warmup_rounds=2)
