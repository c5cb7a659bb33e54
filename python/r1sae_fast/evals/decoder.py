"""How alike the features' directions are: of each, the cosine with the nearest other one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.progress import progress_bar
from r1sae_fast.sae import FastSAE

__all__ = ["DecoderSimilarity", "decoder_similarity"]

_BLOCK_NUMBERS = 1 << 23
ALIKE_ABOVE = 0.9


@dataclass(frozen=True, eq=False)
class DecoderSimilarity:
    """Of each measured feature f, the largest cosine of its row of W_dec with any other feature's.

    Near 1: two features share a direction (duplicates, or one that was split).
    """

    features: Tensor
    """``[n]`` int64: the features that were measured, rising; each was compared with all others."""
    nearest: Tensor
    """``[n]`` float32: that cosine."""
    zero: int
    """Features with a row of zeros, which has no direction; they are left out on both sides."""

    @property
    def mean(self) -> float:
        """Mean of :attr:`nearest`; NaN where there are none."""
        return float(self.nearest.double().mean())

    def quantile(self, share: float) -> float:
        """The smallest value such that ``share`` of them are not larger; NaN where none are."""
        if not len(self.nearest):
            return float("nan")
        place = max(0, math.ceil(share * len(self.nearest)) - 1)
        return float(self.nearest.sort().values[place])

    @property
    def alike_fraction(self) -> float:
        """Share of the measured features whose nearest cosine exceeds 0.9."""
        return float((self.nearest > ALIKE_ABOVE).double().mean())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "features": len(self.features),
            "mean": self.mean,
            "quantiles": {f"{q:g}": self.quantile(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
            "alike_fraction": self.alike_fraction,
            "alike_above": ALIKE_ABOVE,
            "zero": self.zero,
        }


@torch.no_grad()
def decoder_similarity(
    sae: FastSAE,
    *,
    max_features: int | None = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> DecoderSimilarity:
    """The cosine of each feature's direction with the nearest other one.

    Takes ``2 * n * d_sae * d_in`` operations in float32, in blocks: never ``[d_sae, d_sae]``.

    Args:
        sae: on any device.
        max_features: measure at most so many, drawn from all; None measures all.
        seed: of the draw.
        progress: show a bar on stderr; default if that is a terminal.

    Raises:
        ValueError: ``max_features`` below 1.
    """
    if max_features is not None and max_features < 1:
        raise ValueError(f"max_features is {max_features}; expected at least 1")
    W = sae.W_dec.detach()
    norms = torch.cat(
        [part.float().norm(dim=1) for part in torch.split(W, _rows_at_once(sae.d_in))]
    )
    alive = norms > 0
    candidates = alive.nonzero().flatten().cpu()
    measured = candidates
    if max_features is not None and len(candidates) > max_features:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(candidates), generator=generator)[:max_features]
        measured = candidates[drawn].sort().values
    zero = sae.d_sae - len(candidates)
    if len(candidates) < 2:
        return DecoderSimilarity(measured[:0], torch.empty(0), zero)
    # A row of zeros is no one's neighbour.
    scales = torch.where(alive, 1.0 / norms, 0.0)
    nearest = []
    with progress_bar("comparing", len(measured), unit="features", shown=progress) as shown:
        for block in torch.split(measured, _rows_at_once(sae.d_in)):
            block = block.to(W.device)
            nearest.append(_nearest(W, scales, alive, block).cpu())
            shown(sum(map(len, nearest)))
    return DecoderSimilarity(measured, torch.cat(nearest), zero)


def _nearest(W: Tensor, scales: Tensor, alive: Tensor, block: Tensor) -> Tensor:
    """Of the features ``block [n]``, the largest cosine with any other that has a direction."""
    directions = W[block].float() * scales[block, None]
    best = torch.full((len(block),), -1.0, device=W.device)
    step = _rows_at_once(W.shape[1])
    for start in range(0, W.shape[0], step):
        others = slice(start, start + step)
        cosines = directions @ W[others].float().T * scales[others]
        cosines[:, ~alive[others]] = -1.0
        here = (block >= start) & (block < start + step)
        cosines[here, block[here] - start] = -1.0
        best = torch.maximum(best, cosines.amax(1))
    return best.clamp(max=1.0)


def _rows_at_once(d_in: int) -> int:
    """So many rows of W_dec take 32 MiB in float32, and their cosines 64 MiB."""
    return max(1, min(4096, _BLOCK_NUMBERS // d_in))
