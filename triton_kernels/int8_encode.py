"""Exact float32 codes from certified int8 bounds: drop what the bounds exclude, compute the rest.

What is left is computed in float64 and rounded once. For top-k the bounds are used twice: the exact
values of the k largest upper bounds give a floor that cuts the other candidates by more than half
(444 to 185 a row for random unit columns at R1's shape, k 64). A value outside its bounds is seen,
and the rows are then computed without screening.

:mod:`r1sae_fast.triton_kernels.int8_screen` makes the bounds and has their derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.triton_kernels import encode_gemm
from r1sae_fast.triton_kernels.collect import collect, group_bounds_of
from r1sae_fast.triton_kernels.encode_batch_topk import Codes, by_row_and_value, largest
from r1sae_fast.triton_kernels.encode_gemm import Chunk
from r1sae_fast.triton_kernels.encode_topk import padded_codes, select_topk
from r1sae_fast.triton_kernels.int8_screen import (
    GROUP,
    ScreenedWeights,
    bound_chunk,
    can_bound,
    row_bounds,
)
from r1sae_fast.triton_kernels.kth_value import kth_value
from r1sae_fast.triton_kernels.sparse_grad import gradient_of_values

__all__ = ["Screened", "int8_batch_topk", "int8_threshold", "int8_topk"]

MOST_FIRST = 128
"""Largest k for which the k largest upper bounds are computed first."""


@dataclass
class Screened:
    """Codes, and what they took."""

    codes: Codes
    """values, indices int32, row_offsets int64; each row by falling value."""
    candidates: int
    """Exact products computed."""
    exact_rows: int
    """Rows whose features were all computed exactly."""
    violations: int
    """Values seen outside their bounds: 0, or the weights are not those that were quantised."""


class _Found:
    """Exact values by row and feature, and the tally."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.candidates = self.exact_rows = self.violations = 0

    def add(self, values: Tensor, indices: Tensor, owners: Tensor) -> None:
        self.parts.append((values, indices, owners))

    def screened(self, x: Tensor) -> Screened:
        rows = x.shape[0]
        if self.parts:
            values, indices, owners = (torch.cat(p) for p in zip(*self.parts, strict=True))
        else:
            values = x.new_zeros(0)
            indices, owners = (x.new_zeros(0, dtype=t) for t in (torch.int32, torch.int64))
        codes = by_row_and_value(values, indices, owners, rows)
        return Screened(codes, self.candidates, self.exact_rows, self.violations)


def int8_topk(x: Tensor, weights: ScreenedWeights, k: int, *, seed: int = 1) -> Screened:
    """The k largest positive pre-activations of each row, ties to the lower feature.

    Args:
        x: float32 ``[rows, d_in]``. Where it holds NaN or infinities, all is computed whole.
        weights: of :func:`screened_weights`.
        k: 0 to d_sae.
        seed: of the rounding; it does not show in the codes.

    Waits for the GPU.
    """
    d_sae = _checked(weights, k)
    x, found = x.contiguous(), _Found()
    upper, lower = _room(x, d_sae)
    bounded = x.shape[0] > 0 and can_bound(x, weights)
    for first, own in _chunks(x if k else x[:0]):
        count = own.shape[0]
        exact = None
        if bounded:
            bound_chunk(own, weights, seed + first, upper, lower)
            bounds = row_bounds(lower[:count], k)
            if k <= min(MOST_FIRST, d_sae):
                bounds = torch.maximum(bounds, _floor(own, weights, upper, k, found))
            highest, indices, counts = collect(upper, count, bounds, strict=False, per_row=True)
            owners = _owners(counts, highest.shape[0])
            exact = _exact(own, weights, indices, owners, found)
            reached = torch.zeros_like(bounds).index_add_(
                0, owners, (exact >= bounds[owners]) + 0.0
            )
            low = (bounds > 0) & (reached < k)
            if _violated(exact > highest, low, found):
                exact = None
        if exact is None:
            exact, indices, owners = _all_exact(own, weights, found)
        exact, indices, offsets = by_row_and_value(exact, indices, owners, count)
        owners = _owners(offsets.diff(), exact.shape[0])
        place = torch.arange(exact.shape[0], device=x.device) - offsets[owners]
        chosen = (place < k) & (exact > 0)
        found.add(exact[chosen], indices[chosen], first + owners[chosen])
    return found.screened(x)


def int8_threshold(
    x: Tensor, weights: ScreenedWeights, threshold: Tensor, *, seed: int = 1
) -> Screened:
    """The positive pre-activations that exceed ``threshold``, float32 ``[1]`` or ``[d_sae]``; else
    as :func:`int8_topk`."""
    d_sae = weights.exact.shape[0]
    x, found = x.contiguous(), _Found()
    upper, lower = _room(x, d_sae)
    bounds, group_bounds = group_bounds_of(threshold, d_sae, GROUP)
    each = bounds.expand(d_sae)
    bounded = x.shape[0] > 0 and can_bound(x, weights)
    for first, own in _chunks(x):
        count = own.shape[0]
        exact = None
        if bounded:
            bound_chunk(own, weights, seed + first, upper, lower)
            highest, indices, counts = collect(upper, count, bounds, group_bounds, strict=True)
            owners = _owners(counts, highest.shape[0])
            exact = _exact(own, weights, indices, owners, found)
            if _violated(exact > highest, None, found):
                exact = None
        if exact is None:
            exact, indices, owners = _all_exact(own, weights, found)
        chosen = (exact > 0) & (exact > each[indices.long()])
        found.add(exact[chosen], indices[chosen], first + owners[chosen])
    return found.screened(x)


def int8_batch_topk(x: Tensor, weights: ScreenedWeights, k: int, *, seed: int = 1) -> Screened:
    """The ``k * rows`` largest positive pre-activations of all rows, ties to the lower row, then
    feature; else as :func:`int8_topk`."""
    _checked(weights, k)
    x, found = x.contiguous(), _Found()
    wanted = k * x.shape[0]
    if not wanted:
        return found.screened(x)
    values = None
    if can_bound(x, weights):
        highest, indices, owners, bound = _batch_candidates(x, weights, wanted, seed)
        exact, computed = torch.zeros_like(highest), torch.zeros_like(highest, dtype=torch.bool)
        if highest.shape[0] > wanted:
            computed = largest(highest, wanted)
            exact[computed] = _exact(x, weights, indices[computed], owners[computed], found)
            bound = torch.maximum(bound, exact[computed].amin().clamp_min(0))
        left = ~computed & (highest >= bound)
        exact[left] = _exact(x, weights, indices[left], owners[left], found)
        low = (bound > 0) & ((exact >= bound).sum() < wanted)
        if not _violated((computed | left) & (exact > highest), low, found):
            values = exact
    if values is None:
        parts = [(first, _all_exact(own, weights, found)) for first, own in _chunks(x)]
        values = torch.cat([part[0] for _, part in parts])
        indices = torch.cat([part[1] for _, part in parts])
        owners = torch.cat([first + part[2] for first, part in parts])
    kept = values > 0
    values, indices, owners = values[kept], indices[kept], owners[kept]
    if values.shape[0] > wanted:
        kept = largest(values, wanted)
        values, indices, owners = values[kept], indices[kept], owners[kept]
    found.add(values, indices, owners)
    return found.screened(x)


def _batch_candidates(
    x: Tensor, weights: ScreenedWeights, wanted: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upper bounds, features and rows of what may be among the ``wanted`` largest, and a floor that
    so many values reach: the ``wanted``-th largest of all groups' lower bounds."""
    upper, _ = _room(x, weights.exact.shape[0])
    lower = x.new_empty(x.shape[0], upper.maxima.shape[1])
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    bound = x.new_zeros(1)
    for first, own in _chunks(x):
        last = first + own.shape[0]
        bound_chunk(own, weights, seed + first, upper, lower[first:last])
        bound = kth_value(lower[:last].reshape(-1), wanted)
        highest, indices, counts = collect(upper, own.shape[0], bound, strict=False)
        new = (highest, indices, first + _owners(counts, highest.shape[0]))
        if kept is not None:
            above = kept[0] >= bound
            new = tuple(torch.cat([old[above], own]) for old, own in zip(kept, new, strict=True))  # type: ignore[assignment]  # three
        kept = new
    assert kept is not None
    return (*kept, bound)


def _checked(weights: ScreenedWeights, k: int) -> int:
    d_sae = weights.exact.shape[0]
    if not 0 <= k <= d_sae:
        raise ValueError(f"k is {k}; expected 0 to {d_sae}")
    return d_sae


def _chunks(x: Tensor) -> list[tuple[int, Tensor]]:
    size = encode_gemm.CHUNK
    return [(first, x[first : first + size]) for first in range(0, x.shape[0], size)]


def _room(x: Tensor, d_sae: int) -> tuple[Chunk, Tensor]:
    """Upper bounds with their maxima, and the lower bounds' maxima, of one chunk."""
    most, groups = min(x.shape[0], encode_gemm.CHUNK), -(-d_sae // GROUP)
    upper = Chunk(
        x.new_empty(most, d_sae),
        x.new_empty(most, groups),
        x.new_empty(1, dtype=torch.int32),
        GROUP,
    )
    return upper, x.new_empty(most, groups)


def _owners(counts: Tensor, total: int) -> Tensor:
    rows = torch.arange(counts.shape[0], device=counts.device)
    return rows.repeat_interleave(counts, output_size=total)


def _floor(x: Tensor, weights: ScreenedWeights, upper: Chunk, k: int, found: _Found) -> Tensor:
    """The least exact value among the k largest upper bounds: k values are at least as large. 0
    where fewer than k upper bounds are positive."""
    first = padded_codes(x, k)
    select_topk(upper, first, x.shape[0], k)
    owners = torch.arange(x.shape[0], device=x.device).repeat_interleave(k)
    exact = _exact(x, weights, first.indices.reshape(-1), owners, found).view(-1, k)
    least = exact.amin(1)
    return torch.where((first.counts == k) & (least > 0), least, 0.0)


def _exact(
    x: Tensor, weights: ScreenedWeights, indices: Tensor, owners: Tensor, found: _Found
) -> Tensor:
    """The pre-activations of ``indices`` (by rows), summed in float64, rounded, the bias added."""
    found.candidates += indices.shape[0]
    rows, size = x.shape[0], encode_gemm.CHUNK
    offsets = torch.searchsorted(owners, torch.arange(rows + 1, device=x.device))
    if rows <= size:
        exact = gradient_of_values(x, indices, offsets, weights.exact, wide=True)
    else:
        # The tiles' sums of one chunk at a time.
        cuts = [*offsets[::size].tolist(), indices.shape[0]]
        parts = []
        for number, first in enumerate(range(0, rows, size)):
            start, end = cuts[number], cuts[number + 1]
            own = offsets[first : first + size + 1] - start
            part = (x[first : first + size], indices[start:end], own, weights.exact)
            parts.append(gradient_of_values(*part, wide=True))
        exact = torch.cat(parts)
    return exact if weights.b_enc is None else exact + weights.b_enc[indices.long()]


def _violated(above: Tensor, below: Tensor | None, found: _Found) -> bool:
    """Whether values lie outside their bounds. Not in a billion years, or a fault."""
    count = above.sum() if below is None else above.sum() + below.sum()
    seen = int(count)
    found.violations += seen
    return seen > 0


def _all_exact(x: Tensor, weights: ScreenedWeights, found: _Found) -> tuple[Tensor, Tensor, Tensor]:
    """Every positive pre-activation, summed in float64, with its feature and row."""
    found.exact_rows += x.shape[0]
    found.candidates += x.shape[0] * weights.exact.shape[0]
    blocks = [(x.double() @ part.double().T).float() for part in weights.exact.split(4096)]
    pre = torch.cat(blocks, 1)
    if weights.b_enc is not None:
        pre = pre + weights.b_enc
    owners, features = (pre > 0).nonzero(as_tuple=True)
    return pre[owners, features], features.to(torch.int32), owners
