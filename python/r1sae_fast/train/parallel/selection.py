"""Codes among the features of all ranks, found by each among its own.

The merged selection is the one process's, ties too: what a rank offers is cut off only where
all of what it left out is weaker than the weakest that all ranks together keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from r1sae_fast.codes import SparseCodes
from r1sae_fast.train.losses.base import Finder, only
from r1sae_fast.train.parallel.collect import Group, gather, gather_ragged

__all__ = ["MergedFinder", "Offer", "Place", "empty", "gather_codes", "gather_rows", "own_rows"]

_ROOM = 1.125
"""A rank offers so many times the codes that it kept last."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands, and with whom it shares."""

    world: Group
    data: Group
    """The ranks that have the same features, by their share of the rows."""
    latents: Group
    """The ranks that have the same share of the rows, by their features."""

    @property
    def data_rank(self) -> int:
        """Which share of the rows this is."""
        return dist.get_rank(self.data)

    @property
    def data_count(self) -> int:
        """Of shares of the rows."""
        return dist.get_world_size(self.data)

    @property
    def latents_rank(self) -> int:
        """Which share of the features this is."""
        return dist.get_rank(self.latents)

    @property
    def latents_count(self) -> int:
        """Of shares of the features."""
        return dist.get_world_size(self.latents)


class Offer:
    """How many codes a row this rank offers to batch top-k: from what it kept last. The codes
    don't depend on it, only how often they have to be found."""

    def __init__(self) -> None:
        self.k: int | None = None

    def next(self, k: int, features: int, shares: int) -> int:
        """For ``k`` codes a row over so many shares of the features."""
        guess = int(_ROOM * k / shares) + 1 if self.k is None else self.k
        return max(1, min(guess, features))

    def learn(self, kept: int, rows: int) -> None:
        """From what it kept of so many rows."""
        self.k = int(_ROOM * kept / max(rows, 1)) + 1


class MergedFinder:
    """A :class:`~r1sae_fast.train.losses.base.Finder` over the features of all ranks.

    Args:
        find: finds codes among the ``features`` features of this rank.
        first: number that the first of these has among all.
        offer: kept from step to step.
    """

    def __init__(self, place: Place, find: Finder, features: int, first: int, offer: Offer) -> None:
        self._place, self._find = place, find
        self._features, self._first, self._offer = features, first, offer

    def topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """The k strongest of each row: of them, those of own features."""
        rows = x[own_rows(x.shape[0], self._place)]
        codes = empty(rows, self._features)
        if codes.d_sae and rows.shape[0]:
            codes = self._find.topk(rows, min(k, self._features), check_finite=check_finite)
        if self._place.latents_count > 1 and rows.shape[0]:
            codes = only(codes, strongest_of_rows(codes, k, self._place.latents))
        return gather_codes(codes, x.shape[0], self._place)

    def batch_topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """The ``k * rows`` strongest of all rows: of them, those of own features."""
        rows = own_rows(x.shape[0], self._place)
        mine = x[rows]
        offered = self._offer.next(k, self._features, self._place.latents_count)
        while True:
            codes = empty(mine, self._features)
            if mine.shape[0]:
                codes = self._find.batch_topk(mine, offered, check_finite=check_finite)
            whole = offered == self._features or codes.nnz < offered * mine.shape[0]
            offers = _Offers.gather(codes, whole or not mine.shape[0], self._place.world)
            least = offers.least_kept(k * x.shape[0])
            lacking = offers.lacking(least)
            if not any(lacking):
                break
            if lacking[dist.get_rank(self._place.world)]:
                offered = min(2 * offered, self._features)
        keep = offers.keep(codes, least, k * x.shape[0], rows.start, self._first, self._place.world)
        codes = only(codes, keep)
        self._offer.learn(codes.nnz, mine.shape[0])
        return gather_codes(codes, x.shape[0], self._place)

    def threshold(self, x: Tensor, theta: Tensor | float, *, check_finite: bool) -> SparseCodes:
        """Those above ``theta``, a number or own features': of own features."""
        rows = x[own_rows(x.shape[0], self._place)]
        codes = empty(rows, self._features)
        if rows.shape[0]:
            codes = self._find.threshold(rows, theta, check_finite=check_finite)
        return gather_codes(codes, x.shape[0], self._place)


def own_rows(rows: int, place: Place) -> slice:
    """Of so many rows, those that this rank finds and decodes the codes of."""
    size = -(-rows // place.data_count)
    start = min(place.data_rank * size, rows)
    return slice(start, min(start + size, rows))


def empty(rows: Tensor, features: int) -> SparseCodes:
    """No codes of ``rows [n, d_in]``."""
    offsets = torch.zeros(rows.shape[0] + 1, dtype=torch.int64, device=rows.device)
    return SparseCodes(rows.new_empty(0), offsets[:0].to(torch.int32), offsets, features)


def strongest_of_rows(codes: SparseCodes, k: int, group: Group) -> Tensor:
    """``[nnz]``: which codes are among the k strongest of their row over all ranks' features.

    Ties go to the lower rank, then to the lower place in the row: to the lower feature.
    """
    row, places = codes.row_ids, _places(codes)
    own = codes.values.new_zeros(codes.rows, k)
    own[row, places] = codes.values
    every = gather(own, group)  # [ranks, rows, k]
    flat = every.transpose(0, 1).reshape(codes.rows, -1)
    least = flat.topk(k, dim=1).values[:, -1]
    # A row with fewer codes than k has 0 for its least, and keeps all that are above.
    room = k - (flat > least[:, None]).sum(1)
    rank = dist.get_rank(group)
    ties = every == least[None, :, None]
    before = ties[:rank].sum((0, 2))
    among = before[:, None] + ties[rank].cumsum(1)
    keep = (own > least[:, None]) | (ties[rank] & (among <= room[:, None]))
    return keep[row, places]


def _places(codes: SparseCodes) -> Tensor:
    """``[nnz]``: of each code, how many codes of its row come before it."""
    starts = codes.row_offsets[:-1]
    return torch.arange(codes.nnz, device=codes.device) - starts[codes.row_ids]


@dataclass(frozen=True)
class _Offers:
    """What all ranks offer to a batch's selection."""

    values: list[Tensor]
    whole: list[bool]
    """Whether the rank offers all positive values that it has."""

    @classmethod
    def gather(cls, codes: SparseCodes, whole: bool, group: Group) -> _Offers:
        head = torch.tensor([codes.nnz, int(whole)], device=codes.device)
        heads: list[list[int]] = gather(head, group).tolist()
        sizes = [size for size, _ in heads]
        return cls(gather_ragged(codes.values, sizes, group), [bool(one) for _, one in heads])

    def least_kept(self, count: int) -> float:
        """The least of the ``count`` largest; 0 where there are fewer."""
        every = torch.cat(self.values)
        if every.numel() < count:
            return 0.0
        return float(every.kthvalue(every.numel() - count + 1).values)

    def lacking(self, least: float) -> list[bool]:
        """Which ranks may have values that belong to the selection and were not offered."""
        return [
            not whole and bool(values.min() >= least)
            for values, whole in zip(self.values, self.whole, strict=True)
        ]

    def keep(
        self, codes: SparseCodes, least: float, count: int, row: int, feature: int, group: Group
    ) -> Tensor:
        """``[nnz]``: which own codes, of rows from ``row`` and features from ``feature`` on, are
        among the ``count`` largest; ties go to the lower row, then the lower feature."""
        every = torch.cat(self.values)
        room = count - int((every > least).sum())
        tied = [int((values == least).sum()) for values in self.values]
        if sum(tied) <= room or least == 0.0:
            return codes.values >= least
        ties = codes.values == least
        keys = (codes.row_ids[ties] + row) * 2**32 + (codes.indices[ties].long() + feature)
        last = torch.cat(gather_ragged(keys, tied, group)).kthvalue(room).values
        keep = codes.values > least
        keep[ties] = keys <= last
        return keep


def gather_codes(codes: SparseCodes, rows: int, place: Place) -> SparseCodes:
    """The codes of all ``rows`` rows, of which each rank has its share's."""
    if place.data_count == 1:
        return codes
    size = -(-rows // place.data_count)
    counts = F.pad(codes.row_offsets.diff(), (0, size - codes.rows))
    every = gather(counts, place.data)
    sizes: list[int] = every.sum(1).tolist()
    offsets = F.pad(every.view(-1)[:rows].cumsum(0), (1, 0))
    values = torch.cat(gather_ragged(codes.values, sizes, place.data))
    indices = torch.cat(gather_ragged(codes.indices, sizes, place.data))
    return SparseCodes(values, indices, offsets, codes.d_sae)


def gather_rows(rows: Tensor, count: int, place: Place) -> Tensor:
    """All ``count`` rows, of which each rank has its share's."""
    if place.data_count == 1:
        return rows
    # All shares but the last are of one size: what pads them lies behind all rows.
    padded = F.pad(rows, (0, 0, 0, -(-count // place.data_count) - rows.shape[0]))
    return gather(padded, place.data).flatten(0, 1)[:count]
