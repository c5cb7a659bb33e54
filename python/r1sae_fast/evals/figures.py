"""What is measured on activations, with the definition of each figure.

x is a row of activations, x' its reconstruction, a code a feature that is active on a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.sae import Mode

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
DENSE_ABOVE = 0.1
_HALF_DECADES = 16  # from 1e-8


@dataclass(frozen=True, eq=False)
class DensityHistogram:
    """How many features fire how often; half a decade a bin."""

    edges: tuple[float, ...]
    """``n + 1`` shares of the rows, from 1e-8 to 1; a bin holds densities from its lower edge on,
    up to its upper edge, excluded. The first bin also holds what is rarer, the last also 1."""
    counts: tuple[int, ...]
    """``n``: features of each bin."""
    silent: int
    """Features that never fired, which are in no bin."""

    @classmethod
    def of(cls, density: Tensor) -> DensityHistogram:
        """Of densities ``[d_sae]``."""
        edges = [10.0 ** (-(_HALF_DECADES - place) / 2) for place in range(_HALF_DECADES + 1)]
        fired = density[density > 0].double()
        inner = torch.tensor(edges[1:-1], dtype=torch.float64)
        places = torch.bucketize(fired, inner, right=True)
        counts = torch.bincount(places, minlength=_HALF_DECADES)
        return cls(tuple(edges), tuple(counts.tolist()), density.numel() - fired.numel())


@dataclass(frozen=True, eq=False)
class Figures:
    """Figures over a set of rows together; NaN where they are not defined (no variance ...)."""

    rows: int
    """Rows that were counted."""
    fvu: float
    """Fraction of variance unexplained: sum of ``|x - x'|^2`` over sum of ``|x - mean|^2``, the
    mean being that of these rows (the normalised MSE of Gao et al., arXiv:2406.04093)."""
    mse: float
    """Mean of ``|x - x'|^2`` a row (the sum over d_in), in the activations' unit squared."""
    cosine: float
    """Mean cosine of x and x', over rows with x other than 0; 0 where x' is."""
    norm_ratio: float
    """Mean of ``|x'| / |x|``, over rows with x other than 0; below 1 is shrinkage."""
    l0: float
    """Mean codes a row."""
    l0_counts: Tensor
    """``[largest L0 + 1]`` int64: entry n is how many rows have n codes."""
    density: Tensor
    """``[d_sae]`` float64: share of these rows on which each feature fired."""
    dense_above: float
    """From which density on, excluded, a feature is called dense."""

    @property
    def explained_variance(self) -> float:
        """``1 - fvu``."""
        return 1.0 - self.fvu

    @property
    def dead_fraction(self) -> float:
        """Share of the features that fired on none of these rows: the more rows, the fewer."""
        return float((self.density == 0).double().mean())

    @property
    def dense_fraction(self) -> float:
        """Share of the features with a density above :attr:`dense_above`."""
        return float((self.density > self.dense_above).double().mean())

    @property
    def density_histogram(self) -> DensityHistogram:
        """The densities by half decades."""
        return DensityHistogram.of(self.density)

    def l0_quantile(self, share: float) -> int:
        """The smallest n such that at least ``share`` of the rows have n codes or fewer.

        Raises:
            ValueError: ``share`` is not within 0 to 1.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share is {share}; expected 0 to 1")
        reached = self.l0_counts.cumsum(0)
        wanted = max(1, math.ceil(share * self.rows))
        return int((reached < wanted).sum())

    def to_json(self) -> dict[str, Any]:
        """As JSON values; densities as their histogram."""
        histogram = self.density_histogram
        return {
            "rows": self.rows,
            "fvu": self.fvu,
            "explained_variance": self.explained_variance,
            "mse": self.mse,
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
            "l0": self.l0,
            "l0_quantiles": {f"{share:g}": self.l0_quantile(share) for share in QUANTILES},
            "l0_counts": self.l0_counts.tolist(),
            "dead_fraction": self.dead_fraction,
            "dense_fraction": self.dense_fraction,
            "dense_above": self.dense_above,
            "density_histogram": {
                "edges": list(histogram.edges),
                "counts": list(histogram.counts),
                "silent": histogram.silent,
            },
        }


@dataclass(frozen=True, eq=False)
class Reconstruction(Figures):
    """Figures over all rows that were counted, and over each segment's."""

    segments: dict[str, Figures]
    """"prompt", "thinking", "response", "unknown": those with rows. A segment's FVU is relative to
    the variance within it."""
    mode: Mode
    """How codes were chosen."""
    norm_limit: float
    """Rows of a larger norm were left out; infinite where none were."""
    outliers: int
    """Finite rows that were left out by that."""
    non_finite: int
    """Rows left out since they hold a NaN or an infinity."""

    @property
    def left_out(self) -> int:
        """Rows that were not counted."""
        return self.outliers + self.non_finite

    def to_json(self) -> dict[str, Any]:
        """As JSON values; densities as their histogram."""
        return {
            **super().to_json(),
            "segments": {name: figures.to_json() for name, figures in self.segments.items()},
            "mode": self.mode,
            "norm_limit": self.norm_limit,
            "outliers": self.outliers,
            "non_finite": self.non_finite,
        }
