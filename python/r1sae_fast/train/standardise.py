"""Brings activations to a known centre and size for training, and takes that back on saving.

Trained is ``x' = scale * (x - centre)``, whose mean norm is ``sqrt(d_in)``, so that one learning
rate serves every model and layer, and the large constant part of the residual stream is not left to
the first thousand steps. The saved weights take raw ``x``:

    relu(x' E + e) D + d = scale * (relu(x E + (e / scale - centre E)) D + d / scale)

hence ``W_enc = E``, ``W_dec = D``, ``b_enc = e / scale - centre E`` and
``b_dec = d / scale + centre``; codes and threshold shrink by ``scale``. With ``e = d = 0`` at the
start, that is ``b_dec`` at the centre and ``b_enc = -centre E``.

A transcoder's target has a centre and a scale of its own. Its codes are then in the target's units,
which leaves the decoder's rows at norm 1; see :mod:`r1sae_fast.train.export`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.shards import ActivationBatch, ActivationShards, PairedBatch, PairedShards
from r1sae_fast.train.engine_rows import EngineRows
from r1sae_fast.train.geometric_median import geometric_median
from r1sae_fast.train.parallel import ALONE, Ranks

Source = ActivationShards | PairedShards | EngineRows
"""Where rows come from."""

_SAMPLE_ROWS = 16384
_NAMED = 5
"""So many bad rows are named."""
_SAMPLE_NUMBERS = 2**25


class Rows(NamedTuple):
    """What a step is given, on its device, float32 ``[n, d_in]`` each."""

    x: Tensor
    target: Tensor | None
    """What a transcoder is to make of x; None for an autoencoder."""
    left_out: int
    """Rows that are not among these, as outliers."""


def sample(shards: Source, seed: int) -> Tensor:
    """Rows drawn from all shards, float32 ``[n, d_in]``: at most 16384, and 128 MiB.

    Raises:
        ValueError: the shards have no rows.
        NonFiniteError: a NaN or infinite activation.
    """
    return checked(_sample(shards, seed))[0]


def _sample(shards: Source, seed: int) -> ActivationBatch:
    if not isinstance(shards, EngineRows) and len(shards) == 0:
        raise ValueError(f"{shards.folder}: no rows to sample; harvest some first")
    return draw(shards, max(1, min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // shards.d_in)), seed)


def draw(shards: Source, rows: int, seed: int) -> ActivationBatch:
    """``rows`` rows of all shards, or all there are; of an engine's, the first ones."""
    if isinstance(shards, EngineRows):
        return shards.draw(rows, seed)
    return next(iter(shards.loader(min(rows, len(shards)), shuffle=True, seed=seed)))


def checked(
    batch: ActivationBatch, device: torch.device | None = None, *, targets: bool = False
) -> tuple[Tensor, Tensor]:
    """The activations, or the targets of a pair, as float32 ``[n, d_in]`` and their norms ``[n]``,
    on ``device`` (as they are stored they cross to it: half the bytes, and from page-locked memory
    without a wait).

    Raises:
        NonFiniteError: names the sequences and positions of NaN or infinite rows.
    """
    stored = batch.targets if targets and isinstance(batch, PairedBatch) else batch.activations
    rows = stored.to(device, non_blocking=True).float()
    norms = rows.norm(dim=1)
    finite = norms.isfinite()
    if not bool(finite.all()):
        bad: list[int] = (~finite).nonzero().flatten().tolist()
        places = [
            f"position {int(batch.position[at])} of sequence {int(batch.sequence_id[at])}"
            for at in bad[:_NAMED]
        ]
        raise NonFiniteError(
            f"{'targets' if targets else 'activations'} hold a NaN or infinite value at "
            f"{', '.join(places)}{', ...' if len(bad) > _NAMED else ''} ({len(bad)} of a batch's "
            f"{len(norms)} rows; -1 is unknown); remove such rows from the shards"
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
    target: Standardisation | None = None
    """Of what a transcoder is to make."""

    @classmethod
    def of(cls, shards: Source, *, outlier_factor: float, seed: int) -> Standardisation:
        """Measured on a sample of the shards.

        Raises:
            ValueError: no rows, or all rows are equal.
        """
        batch = _sample(shards, seed)
        found = cls._of_rows(checked(batch)[0], outlier_factor, f"{shards.folder}")
        if not isinstance(shards, PairedShards):
            return found
        aims, _ = checked(batch, targets=True)
        target = cls._of_rows(aims, outlier_factor, f"{shards.targets.folder}")
        return cls(found.centre, found.scale, found.norm_limit, target)

    @classmethod
    def _of_rows(cls, rows: Tensor, outlier_factor: float, where: str) -> Standardisation:
        limit = norm_limit(rows, outlier_factor)
        rows = rows[rows.norm(dim=1) <= limit]
        centre = geometric_median(rows)
        size = float((rows - centre).norm(dim=1).mean())
        if size == 0.0:
            raise ValueError(
                f"{where}: all of {len(rows)} sampled rows are equal; there is nothing to "
                "learn from them"
            )
        return cls(centre, math.sqrt(rows.shape[1]) / size, limit)

    def apply(self, batch: ActivationBatch, device: torch.device, ranks: Ranks = ALONE) -> Rows:
        """The rows to train on, standardised.

        Of the whole batch, of which each of the ``ranks`` has read a part. A pair is left out
        where either of the two is an outlier.
        """
        rows, norms = checked(batch, device)
        keep = norms <= self.norm_limit
        width = rows.shape[1]
        if self.target is not None:
            aims, norms = checked(batch, device, targets=True)
            keep &= norms <= self.target.norm_limit
            rows = torch.cat([rows, aims], 1)  # to go to the other ranks together
        left_out = int(keep.numel() - keep.sum())
        if left_out:
            rows = rows[keep]
        rows, left_out = ranks.rows(rows, left_out)
        x = self._standardised(rows[:, :width])
        target = None if self.target is None else self.target._standardised(rows[:, width:])
        return Rows(x, target, left_out)

    def _standardised(self, rows: Tensor) -> Tensor:
        return (rows - self.centre.to(rows.device)).mul_(self.scale)
