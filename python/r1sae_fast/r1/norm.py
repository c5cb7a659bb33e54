"""Root-mean-square normalisation, in float32 as R1's code does it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r1sae_fast.r1 import glue


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(
        self,
        width: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``x`` [..., width]; computed in float32, returned in x's dtype."""
        if glue.serves(x, self.weight):
            return glue.rms_norm(x, self.weight, self.eps)
        # One pass over x in its own dtype, where a mean of squares takes a copy and two passes.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        normalised = (x * scale).to(x.dtype)
        if torch.is_grad_enabled():
            return self.weight * normalised
        return normalised.mul_(self.weight)
