"""Examples of a feature from the whole range of its strengths, not just the strongest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1sae_fast import _core


@dataclass(frozen=True)
class Interval:
    """A range of a feature's strengths, and some of the rows in it."""

    low: float
    """The least strength of the interval; 0 for the first."""
    high: float
    """All its strengths are below; infinite for the last."""
    count: int
    """How many activations it has."""
    strengths: list[float]
    """Of the sampled rows."""
    rows: list[int]
    """A uniform sample of the interval's rows."""


def intervals(
    histogram: NDArray[np.int64],
    strengths: NDArray[np.float32],
    rows: NDArray[np.int64],
    sampling: tuple[int, int],
    largest: float,
    wanted: tuple[int, int, str],
) -> list[Interval]:
    """See :meth:`r1sae_fast.examples.Examples.intervals`.

    Args:
        histogram: ``[96]`` of the feature.
        strengths: of its samples, by rising bin.
        rows: of its samples.
        sampling: the most samples of a bin, and their seed.
        largest: its largest strength.
        wanted: how many intervals, examples of each, and of the same what.
    """
    count, per_interval, by = wanted
    if count < 1 or per_interval < 0:
        raise ValueError(
            f"count is {count} and per_interval {per_interval}; expected at least 1 and 0"
        )
    edges = _core.example_histogram_edges()
    cuts = _cuts(histogram, edges, largest, count, by)
    bins = np.clip(np.searchsorted(edges, strengths, side="right") - 1, 0, len(histogram) - 1)
    ranks = _core.example_sample_ranks(rows, sampling[1])
    # Of a bin that has more rows than samples, only those up to its last rank are known; so of an
    # interval, those up to the least such rank are all there are: a uniform sample.
    known = np.full(len(histogram), np.iinfo(np.uint64).max, dtype=np.uint64)
    for place in np.unique(bins):
        if histogram[place] > sampling[0]:
            known[place] = ranks[bins == place].max()
    found: list[Interval] = []
    for start, stop in itertools.pairwise(cuts):
        inside = (bins >= start) & (bins < stop) & (ranks <= known[start:stop].min())
        order = np.flatnonzero(inside)
        order = order[np.argsort(ranks[order])][:per_interval]
        found.append(
            Interval(
                low=0.0 if not found else float(edges[start]),
                high=float(edges[stop]) if stop < cuts[-1] else float("inf"),
                count=int(histogram[start:stop].sum()),
                strengths=strengths[order].tolist(),
                rows=rows[order].tolist(),
            )
        )
    return found


def _cuts(
    histogram: NDArray[np.int64], edges: NDArray[np.float32], largest: float, count: int, by: str
) -> list[int]:
    """Rising bins at which the intervals begin, and the one after the last."""
    if by not in ("strength", "count"):
        raise ValueError(f"by is {by!r}; expected 'strength' or 'count'")
    used = np.flatnonzero(histogram)
    if used.size == 0:
        return [0]
    first, last = int(used[0]), int(used[-1]) + 1
    shares: NDArray[Any] = np.arange(1, count) / count
    if by == "strength":
        # The nearest edge, where near is a matter of ratios as it is in the histogram.
        between = np.log2(np.maximum(largest * shares, np.finfo(np.float32).tiny))
        inner = np.abs(np.log2(edges)[None, :] - between[:, None]).argmin(axis=1)
    else:
        before = np.concatenate([[0], histogram.cumsum()])
        inner = np.abs(before[None, :] - (before[-1] * shares)[:, None]).argmin(axis=1)
    return sorted({first, last, *(int(cut) for cut in inner if first < cut < last)})
