"""Brings activations to a known centre and size for training, and takes that back on saving.

Trained is ``x' = scale * (x - centre)``, whose mean norm is ``sqrt(d_in)``, so that one learning
rate serves every model and layer, and the large constant part of the residual stream is not left to
the first thousand steps. The saved weights take raw ``x``:

    relu(x' E + e) D + d = scale * (relu(x E + (e / scale - centre E)) D + d / scale)

hence ``W_enc = E``, ``W_dec = D``, ``b_enc = e / scale - centre E`` and
``b_dec = d / scale + centre``; codes and threshold shrink by ``scale``. With ``e = d = 0`` at the
start, that is ``b_dec`` at the centre and ``b_enc = -centre E``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.shards import ActivationBatch, ActivationShards
from r1sae_fast.train.engine_rows import EngineRows
from r1sae_fast.train.geometric_median import geometric_median
from r1sae_fast.train.parallel import ALONE, Ranks

_SAMPLE_ROWS = 16384
_SAMPLE_NUMBERS = 2**25


def sample(shards: ActivationShards | EngineRows, seed: int) -> Tensor:
    """Rows drawn from all shards, float32 ``[n, d_in]``: at most 16384, and 128 MiB.

    Raises:
        ValueError: the shards have no rows.
        NonFiniteError: a NaN or infinite activation.
    """
    if isinstance(shards, ActivationShards) and len(shards) == 0:
        raise ValueError(f"{shards.folder}: no rows to sample; harvest some first")
    rows = max(1, min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // shards.d_in))
    return checked(draw(shards, rows, seed))[0]


def draw(shards: ActivationShards | EngineRows, rows: int, seed: int) -> ActivationBatch:
    """``rows`` rows of all shards, or all there are; of an engine's, the first ones."""
    if isinstance(shards, EngineRows):
        return shards.draw(rows, seed)
    return next(iter(shards.loader(min(rows, len(shards)), shuffle=True, seed=seed)))


def checked(batch: ActivationBatch, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The activations as float32 ``[n, d_in]`` and their norms ``[n]``, on ``device`` (as they are
    stored they cross to it: half the bytes, and from page-locked memory without a wait).

    Raises:
        NonFiniteError: names the sequence and position of a NaN or infinite row.
    """
    rows = batch.activations.to(device, non_blocking=True).float()
    norms = rows.norm(dim=1)
    finite = norms.isfinite()
    if not bool(finite.all()):
        at = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"activations hold a NaN or infinite value at position {int(batch.position[at])} of "
            f"sequence {int(batch.sequence_id[at])}; remove that row from the shards"
        )
    return rows, norms


def norm_limit(sample_rows: Tensor, outlier_factor: float) -> float:
    """The norm above which a row is an outlier: ``outlier_factor`` times the sample's median."""
    return float(sample_rows.norm(dim=1).median()) * outlier_factor


@dataclass(frozen=True)
class Standardisation:
    """The centre, scale and largest norm of the rows that are trained on."""

    centre: Tensor
    """``[d_in]`` float32: the geometric median of a sample."""
    scale: float
    norm_limit: float

    @classmethod
    def of(
        cls, shards: ActivationShards | EngineRows, *, outlier_factor: float, seed: int
    ) -> Standardisation:
        """Measured on a sample of the shards.

        Raises:
            ValueError: no rows, or all rows are equal.
        """
        rows = sample(shards, seed)
        limit = norm_limit(rows, outlier_factor)
        rows = rows[rows.norm(dim=1) <= limit]
        centre = geometric_median(rows)
        size = float((rows - centre).norm(dim=1).mean())
        if size == 0.0:
            raise ValueError(
                f"{shards.folder}: all of {len(rows)} sampled rows are equal; there is nothing to "
                "learn from them"
            )
        return cls(centre, math.sqrt(shards.d_in) / size, limit)

    def apply(
        self, batch: ActivationBatch, device: torch.device, ranks: Ranks = ALONE
    ) -> tuple[Tensor, int]:
        """The rows to train on, standardised, float32 ``[n, d_in]``; and how many were left out.

        Of the whole batch, of which each of the ``ranks`` has read a part.
        """
        rows, norms = checked(batch, device)
        keep = norms <= self.norm_limit
        left_out = int(keep.numel() - keep.sum())
        if left_out:
            rows = rows[keep]
        rows, left_out = ranks.rows(rows, left_out)
        return (rows - self.centre.to(device)).mul_(self.scale), left_out
