"""Linear layers and embeddings whose weights wait to be filled.

A checkpoint or a training recipe fills every weight, so drawing torch's initial values first
would be wasted: for R1, minutes of random numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear`` without bias and without initial values."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, outputs, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""

    def prepare(self, x: Tensor) -> Tensor:
        """What this layer, and others of the same input, may be given in place of ``x``: where
        weights are fp8, activations are quantised here, once for all of them."""
        return x


class Embedding(nn.Embedding):
    """``nn.Embedding`` without initial values."""

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""
