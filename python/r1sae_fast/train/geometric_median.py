"""The point with the least sum of distances to all rows: a centre that outliers can't drag away."""

from __future__ import annotations

import torch
from torch import Tensor


def geometric_median(rows: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Weiszfeld's iteration, from the mean (Vardi and Zhang, PNAS 2000, for points met exactly).

    Args:
        rows: ``[n, d]``, floating, finite, n at least 1.
        iterations: at most so many.
        tolerance: stop when a step is smaller than this share of the mean distance.

    Returns:
        ``[d]`` in the dtype of ``rows`` (at least float32).

    Raises:
        ValueError: no rows, or not a matrix.
    """
    if rows.dim() != 2 or rows.shape[0] == 0:
        raise ValueError(f"rows have shape {tuple(rows.shape)}; expected [n, d] with n at least 1")
    points = rows.to(torch.promote_types(rows.dtype, torch.float32))
    median = points.mean(0)
    for _ in range(iterations):
        distances = (points - median).norm(dim=1)
        scale = distances.mean()
        met = distances <= 1e-12 * scale
        if bool(met.all()):
            break
        weights = torch.where(met, 0.0, 1.0 / distances.where(~met, 1.0))
        target = (weights @ points) / weights.sum()
        # A point that the iterate has met pulls with a force of at most its multiplicity.
        pull = ((target - median) * weights.sum()).norm()
        hold = (met.sum() / pull).clamp_max(1.0) if bool(pull > 0) else 1.0
        step = (1.0 - hold) * (target - median)
        median = median + step
        if bool(step.norm() <= tolerance * scale):
            break
    return median
