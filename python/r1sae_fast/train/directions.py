"""The weights that training begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.ops._memory import empty_weights
from r1sae_fast.train.config import TrainConfig

__all__ = ["first_directions", "unit_rows"]

_DRAWN_ROWS = 1024


def first_directions(seed: int, config: TrainConfig, d_in: int, start: int, end: int) -> Tensor:
    """Rows ``start`` to ``end`` of the first encoder (decoder), without making all at once."""
    # On the CPU whatever the device, so that the seed means the same weights everywhere.
    generator = torch.Generator().manual_seed(seed)
    result = empty_weights(end - start, d_in, dtype=torch.float32)
    at = 0
    while at < config.d_sae:
        # Torch draws 16 numbers at a time: in such blocks it draws what it draws in one.
        size = config.d_sae - at
        if size >= 2 * _DRAWN_ROWS and end - start < config.d_sae:
            size = _DRAWN_ROWS
        block = unit_rows(torch.randn(size, d_in, generator=generator))
        low, high = max(start, at), min(end, at + size)
        if low < high:
            result[low - start : high - start] = block[low - at : high - at]
        at += size
    return result


def unit_rows(matrix: Tensor) -> Tensor:
    """Scales each row to norm 1, in place."""
    return matrix.div_(matrix.norm(dim=1, keepdim=True).clamp_min(1e-12))
