"""Weights and activations like those of R1's layer 37, and how exact codes are told."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.shapes import Shape
from r1sae_fast import FastSAE, SparseCodes
from r1sae_fast.sae.config import Mode

# The released sample: an rms of 0.075 and some dimensions far above it.
RMS = 0.075
OUTLIERS = (1.6, 1.3, 1.25, 1.05, 0.8, 0.7)


def make_sae(shape: Shape, mode: Mode, dtype: torch.dtype, *, tied: bool = True) -> FastSAE:
    """Random unit rows: no tail of strong features, so the most candidates a screen can meet."""
    torch.manual_seed(0)
    sae = FastSAE(shape.d_in, shape.d_sae, shape.k, mode, tied=tied, dtype=dtype)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.01)
        sae.b_dec.normal_(std=0.01)
    return sae


def make_x(rows: int, d_in: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Residuals ``[rows, d_in]`` with R1's outlier dimensions: the model's, whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d_in, generator=generator) * RMS
    places = torch.randperm(d_in, generator=torch.Generator().manual_seed(0))[: len(OUTLIERS)]
    x[:, places] += torch.tensor(OUTLIERS)
    return x.to(dtype)


@torch.no_grad()
def inexact_rows(sae: FastSAE, x: Tensor, codes: SparseCodes) -> tuple[int, int]:
    """Rows whose codes are not the top k of ``x @ W_enc + b_enc`` summed in float64 and rounded to
    float32 once, ties to the lower feature: those of other features, and those of other features or
    values.

    Takes a product in float64: seconds at R1's shape.
    """
    dense = torch.empty(len(x), sae.d_sae)
    for start in range(0, sae.d_sae, 4096):  # of W_enc one slice at a time in float64
        part = slice(start, start + 4096)
        W_enc, b_enc = sae.W_enc[:, part].double(), sae.b_enc[part].double()
        dense[:, part] = (x.double() @ W_enc + b_enc).float()
    dense.relu_()
    # One integer key: value, then the lower feature first.
    order = torch.arange(sae.d_sae - 1, -1, -1)
    key = (dense.view(torch.int32).long() << 32) | order
    best = key.topk(sae.k, dim=1).indices
    expected = torch.zeros_like(dense).scatter(1, best, dense.gather(1, best))
    found = codes.to_dense().float()
    features = ((found != 0) != (expected != 0)).any(dim=1)
    return int(features.sum()), int((found != expected).any(dim=1).sum())
