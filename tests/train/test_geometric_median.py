"""The geometric median: least sum of distances, unmoved by outliers, exact where it is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast.train import geometric_median


def cost(rows: Tensor, point: Tensor) -> float:
    return float((rows - point).norm(dim=1).sum())


@given(seed=st.integers(0, 2**32), n=st.integers(1, 40), d=st.integers(1, 6))
def test_no_other_point_is_better(seed: int, n: int, d: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows = rows[torch.randint(n, (n,), generator=generator)]  # some points several times
    median = geometric_median(rows, iterations=2000, tolerance=1e-12)
    best = cost(rows, median)
    others = [*rows, rows.mean(0), rows.median(0).values]
    others += [median + 0.05 * torch.randn(d, generator=generator) for _ in range(20)]
    assert all(best <= cost(rows, other) * (1 + 1e-4) + 1e-12 for other in others)


def test_a_third_of_outliers_moves_it_little() -> None:
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    moved = rows.clone()
    moved[:100] = 1e6
    assert float(geometric_median(moved).norm()) < 4
    assert float(moved.mean(0).norm()) > 1e5


def test_a_point_with_half_of_the_weight_is_it() -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 1.0], [-5.0, 2.0]])
    torch.testing.assert_close(geometric_median(rows), torch.zeros(2), atol=1e-6, rtol=0)


def test_bf16_rows_give_a_float32_median() -> None:
    rows = torch.full((5, 3), 2.0, dtype=torch.bfloat16)
    assert torch.equal(geometric_median(rows), torch.full((3,), 2.0))


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 2, 2)])
def test_no_rows_or_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\[n, d\\]"):
        geometric_median(torch.zeros(shape))
