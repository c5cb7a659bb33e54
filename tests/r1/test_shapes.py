"""Few sizes for products, and what is filled up to them changes nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from r1sae_fast.r1 import moe
from r1sae_fast.r1.engines.local import LocalEngine
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.shapes import padded, size_of

CPU = torch.device("cpu")


def test_sizes_are_few_and_little_larger() -> None:
    sizes = [size_of(rows) for rows in range(20_000)]
    assert all(size >= rows for rows, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert all(size_of(size) == size for size in set(sizes))
    assert all(size <= max(rows * 9 / 8, rows + 15) for rows, size in enumerate(sizes))
    assert len(set(sizes)) < 80
    assert [size_of(rows) for rows in (0, 1, 3, 9, 17, 129, 257)] == [0, 1, 4, 16, 32, 144, 288]


def test_only_where_products_are_compiled() -> None:
    assert padded(100, torch.float32, CPU) == 100
    assert padded(100, torch.bfloat16, torch.device("cuda")) == 100
    assert padded(100, torch.bfloat16, CPU) == 112
    assert padded(100, torch.bfloat16, CPU, 105) == 105
    assert padded(100, torch.bfloat16, CPU, 90) == 100


@pytest.mark.parametrize("gradients", [False, True])
def test_experts_of_filled_up_rows(
    make_model: Callable[..., R1Model], monkeypatch: pytest.MonkeyPatch, gradients: bool
) -> None:
    """In float32, where rows of a product don't depend on how many there are but for rounding."""
    model = make_model(n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=2)
    tokens = torch.randint(0, 96, (3, 45), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(gradients):
        expected = model.residual(tokens)
        asked: list[int] = []

        def always(rows: int, *_: object) -> int:
            asked.append(rows)
            return size_of(rows)

        monkeypatch.setattr(moe, "padded", always)
        found = model.residual(tokens)
    assert any(size_of(rows) != rows for rows in asked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_padded_batches(engine: LocalEngine) -> None:
    """Padding further than the longest leaves the rows and the taps' positions as they are."""
    sequences = [list(range(3, 3 + length)) for length in (21, 1, 33)]
    (plain,) = engine.rows(sequences, 3, batch_size=3)
    engine.width_of = lambda batch: 48  # type: ignore[method-assign]  # as in bfloat16
    (wide,) = engine.rows(sequences, 3, batch_size=3)
    assert plain[0] == wide[0] == 3
    torch.testing.assert_close(wide[1], plain[1], rtol=1e-4, atol=1e-4)
