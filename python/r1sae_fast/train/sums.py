"""Sums over batches. On the CPU some rows at a time: a temporary of a batch's size costs more in
new pages of memory than its arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["squared_deviations", "sum_of_squares"]

_CACHED_NUMBERS = 1 << 18


def sum_of_squares(x: Tensor) -> Tensor:
    """Of all numbers of ``x [n, d]``."""
    return torch.stack([part.square().sum() for part in _parts(x)]).sum()


def squared_deviations(x: Tensor) -> Tensor:
    """The sum of squares of what ``x [n, d]`` differs from its mean row by."""
    mean = x.mean(0)
    return torch.stack([(part - mean).square().sum() for part in _parts(x)]).sum()


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    if x.device.type != "cpu":
        return (x,)
    return torch.split(x, max(1, _CACHED_NUMBERS // max(1, x.shape[1])))
