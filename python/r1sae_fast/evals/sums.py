"""The sums behind the figures: one pass, memory that does not grow with the rows, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.evals.figures import Figures
from r1sae_fast.r1.segments import Segment

SEGMENTS = tuple(segment.name.lower() for segment in Segment)
"""Names in the order in which they are counted; the last is "unknown"."""
_COUNT = len(SEGMENTS)
# 1 MiB in float64: what is made on the way stays in the cache, and in memory that is used again.
_CHUNK_NUMBERS = 1 << 17


def segment_places(segment: Tensor) -> Tensor:
    """Places in :data:`SEGMENTS` of a shard's segment column ``[n]`` uint8: int64 ``[n]``."""
    places = torch.full(segment.shape, _COUNT - 1, dtype=torch.int64)
    for place, one in enumerate(Segment):
        places[segment.cpu() == int(one)] = place
    return places


@dataclass(frozen=True)
class _Moments:
    """Sums over rows, float64 on the CPU; each ``[segments]`` but for ``total``."""

    total: Tensor
    """Sum of ``x - origin``, ``[segments, d_in]``."""
    squares: Tensor
    """Sum of ``|x - origin|^2``."""
    error: Tensor
    """Sum of ``|x - x'|^2``."""
    cosine: Tensor
    ratio: Tensor
    nonzero: Tensor
    """Rows with x other than 0."""

    @classmethod
    def zero(cls, d_in: int) -> _Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(_COUNT, *shape, dtype=torch.float64)

        return cls(zeros(d_in), zeros(), zeros(), zeros(), zeros(), zeros())

    def add(self, x: Tensor, reconstruction: Tensor, origin: Tensor, members: Tensor) -> None:
        """Rows float64 ``[n, d_in]``; ``members [segments, n]`` is 1 where a row is of a segment.

        Sums over rows are products with ``members``: in a fixed order on every device.
        """
        norms, other = x.norm(dim=1), reconstruction.norm(dim=1)
        there = norms > 0
        safe = norms.where(there, 1.0)
        cosine = (x * reconstruction).sum(1) / (safe * other.where(other > 0, 1.0))
        error = (x - reconstruction).square().sum(1)
        shifted = x - origin
        self.total.add_((members @ shifted).cpu())
        columns = torch.stack(
            [shifted.square().sum(1), error, cosine * there, other / safe * there, there.double()]
        )
        sums = (members @ columns.T).cpu()
        targets = (self.squares, self.error, self.cosine, self.ratio, self.nonzero)
        for target, column in zip(targets, sums.T, strict=True):
            target.add_(column)


class Sums:
    """Adds up rows, their reconstructions and codes, by segment.

    Args:
        d_in, d_sae: of the SAE.
        device: where rows and codes will lie.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device) -> None:
        self.d_sae = d_sae
        self._moments = _Moments.zero(d_in)
        # The first row: sums of squares around a point among the rows lose nothing to a large
        # mean, and rows that are all equal have a variance of exactly 0.
        self._origin: Tensor | None = None
        self._fired = torch.zeros(_COUNT * d_sae, dtype=torch.int64, device=device)
        self._l0 = torch.zeros(_COUNT, 1, dtype=torch.int64)

    def add(self, x: Tensor, reconstruction: Tensor, codes: SparseCodes, places: Tensor) -> None:
        """Adds rows.

        Args:
            x, reconstruction: ``[n, d_in]``, finite, of any float dtype.
            codes: of these rows.
            places: of each row's segment in :data:`SEGMENTS`, int64 ``[n]``.
        """
        n, d_in = x.shape
        if n == 0:
            return
        if self._origin is None:
            self._origin = x[0].double()
        places = places.to(x.device)
        members = (torch.arange(_COUNT, device=x.device)[:, None] == places).double()
        step = max(1, _CHUNK_NUMBERS // d_in)
        for start in range(0, n, step):
            part = slice(start, start + step)
            self._moments.add(
                x[part].double(), reconstruction[part].double(), self._origin, members[:, part]
            )
        counts = codes.row_offsets.diff()
        of_codes = torch.repeat_interleave(places, counts, output_size=codes.nnz)
        self._fired += torch.bincount(
            of_codes * self.d_sae + codes.indices, minlength=_COUNT * self.d_sae
        )
        width = max(self._l0.shape[1], int(counts.max()) + 1)
        flat = torch.bincount(places * width + counts, minlength=_COUNT * width)
        grown = flat.reshape(_COUNT, width).cpu()
        grown[:, : self._l0.shape[1]] += self._l0
        self._l0 = grown

    @property
    def rows(self) -> int:
        """Rows added."""
        return int(self._l0.sum())

    def figures(self, segment: int | None, dense_above: float) -> Figures:
        """Of one segment's rows, or of all."""
        return Figures(**self.fields(segment, dense_above))

    def fields(self, segment: int | None, dense_above: float) -> dict[str, Any]:
        """The arguments of :class:`Figures`."""
        chosen = slice(None) if segment is None else slice(segment, segment + 1)
        l0_counts = self._l0[chosen].sum(0)
        rows = int(l0_counts.sum())
        used = int(l0_counts.nonzero().max()) + 1 if rows else 1
        l0_counts = l0_counts[:used].clone()
        fired = self._fired.reshape(_COUNT, self.d_sae)[chosen].sum(0).cpu()
        moments = self._moments
        total = moments.total[chosen].sum(0)

        def sum_of(column: Tensor) -> float:
            return float(column[chosen].sum())

        error = sum_of(moments.error)
        variance = sum_of(moments.squares) - (float(total.square().sum()) / rows if rows else 0.0)
        nonzero = sum_of(moments.nonzero)
        return {
            "rows": rows,
            "fvu": _ratio(error, variance),
            "mse": _ratio(error, rows),
            "cosine": _ratio(sum_of(moments.cosine), nonzero),
            "norm_ratio": _ratio(sum_of(moments.ratio), nonzero),
            "l0": _ratio(float((l0_counts * torch.arange(used)).sum()), rows),
            "l0_counts": l0_counts,
            "density": fired.double() / max(rows, 1),
            "dense_above": dense_above,
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
