"""The semantics of the sae.py that was released with R1's SAEs, in our own words.

Tied weights ``W [d_in, d_sae]``; codes are dense; the strongest ``k * rows`` of the whole batch's
pre-activations (after relu) are kept; ``codes @ W.T + b_dec`` decodes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peers import Peer


class BatchTopKTied(nn.Module):
    """As released: dense codes, one top-k over the whole batch."""

    def __init__(self, W: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> None:
        super().__init__()
        self.W, self.b_enc, self.b_dec = map(nn.Parameter, (W, b_enc, b_dec))
        self.k = k

    def encode(self, x: Tensor) -> Tensor:
        """Dense codes ``[..., d_sae]``."""
        f = torch.relu(x @ self.W + self.b_enc)
        flat = f.reshape(-1)
        found = torch.topk(flat, self.k * math.prod(x.shape[:-1]), dim=-1)
        kept = torch.zeros_like(flat).scatter(-1, found.indices, found.values)
        return kept.reshape(f.shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(reconstruction, codes)``."""
        f = self.encode(x)
        return f @ self.W.T + self.b_dec, f


class Goodfire(Peer):
    """Tied and batch top-k, so it ignores ``W_dec``, which must be ``W_enc`` transposed."""

    module: BatchTopKTied

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> None:
        self.module = BatchTopKTied(W_enc.contiguous(), b_enc, b_dec, k)

    def encode(self, x: Tensor) -> Tensor:
        return self.module.encode(x)

    def forward(self, x: Tensor) -> Tensor:
        reconstruction: Tensor = self.module(x)[0]
        return reconstruction

    def dense_codes(self, x: Tensor) -> Tensor:
        return self.module.encode(x)


build = Goodfire
