"""The threshold with which an SAE keeps so many codes a row on average, measured on activations.

In mode "batch_topk" a token's codes depend on what else is in its batch; in mode "threshold" they
do not (Bussmann et al., arXiv:2412.06410, section 3). The released R1 SAEs come without one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.progress import progress_bar
from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train.standardise import checked, norm_limit, sample

__all__ = ["Calibration", "calibrate"]

_GUESS_ROWS = 256


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it was found on."""

    threshold: float
    """Codes are the pre-activations above it."""
    wanted: float
    """Codes a row, on average, that were asked for."""
    l0: float
    """Codes a row that it gives on these rows; another number only where strengths are equal, or
    where there aren't so many above 0."""
    rows: int
    """Rows that were counted."""
    left_out: int
    """Rows that were not, as outliers."""


@torch.no_grad()
def calibrate(
    sae: FastSAE,
    shards: ActivationShards | str | os.PathLike[str],
    l0: float | None = None,
    *,
    max_rows: int = 65536,
    batch_rows: int = 2048,
    outlier_factor: float = 10.0,
    progress: bool | None = None,
) -> Calibration:
    """Sets ``sae.threshold`` so that the rows get ``l0`` codes on average.

    Exact over all rows together, unlike :meth:`FastSAE.calibrate_threshold`'s mean over batches:
    the ``l0 * rows`` strongest codes lie above it.

    Args:
        sae: on any device.
        shards: activations to measure on.
        l0: codes a row; default the SAE's k.
        max_rows: at most so many, drawn from all.
        batch_rows: rows at a time; has no say in the result.
        outlier_factor: rows are left out whose norm exceeds the median by this factor (attention
            sinks, the first token); where training left out rows, those of larger norm than then.
        progress: show a bar on stderr; default if that is a terminal.

    Raises:
        ValueError: no rows, another d_in, or l0 not above 0 or above d_sae.
        NonFiniteError: a NaN or infinite activation.
    """
    if not isinstance(shards, ActivationShards):
        shards = ActivationShards(shards)
    if shards.d_in != sae.d_in:
        raise ValueError(f"the shards have d_in = {shards.d_in}, the SAE {sae.d_in}")
    wanted = float(sae.k if l0 is None else l0)
    if not 0.0 < wanted <= sae.d_sae:
        raise ValueError(f"l0 is {wanted:g}; expected more than 0 and at most d_sae = {sae.d_sae}")
    for name, value in (("max_rows", max_rows), ("batch_rows", batch_rows)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    limit = sae.metadata.get("norm_limit")
    if limit is None:
        limit = norm_limit(sample(shards, seed=0), outlier_factor)
    source = _Rows(shards, sae.device, min(max_rows, len(shards)), batch_rows, float(limit))
    before, mode = sae.threshold, sae.mode
    try:
        sae.mode = "threshold"
        with progress_bar("calibrating", source.total, unit="rows", shown=progress) as shown:
            threshold, count, rows = _search(sae, source, wanted, shown)
    except BaseException:
        sae.threshold = before
        raise
    finally:
        sae.mode = mode
    sae.threshold = torch.tensor(threshold, dtype=torch.float32, device=sae.device)
    return Calibration(threshold, wanted, count / rows, rows, source.total - rows)


@dataclass(frozen=True)
class _Rows:
    """The same rows each time it is gone through."""

    shards: ActivationShards
    device: torch.device
    total: int
    batch_rows: int
    limit: float

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Rows without outliers, and how many rows were looked at so far."""
        shuffle = self.total < len(self.shards)
        seen = 0
        for batch in self.shards.loader(min(self.batch_rows, self.total), shuffle=shuffle):
            x, norms = checked(batch)
            x, norms = x[: self.total - seen], norms[: self.total - seen]
            seen += x.shape[0]
            yield x[norms <= self.limit].to(self.device), seen
            if seen >= self.total:
                return


class _Strongest:
    """Finds the ``size``-th largest of many numbers, all at least ``bound`` to begin with."""

    def __init__(self, size: int, bound: float) -> None:
        self.size = size
        self.bound = bound
        """No smaller number matters any more."""
        self.equal = 0
        """Numbers equal to the bound that are not held: they may be many."""
        self.above: list[Tensor] = []
        self.held = 0

    def add(self, values: Tensor) -> None:
        """Adds numbers; those below the bound must have been left out."""
        self.above.append(values.float())
        self.held += values.numel()
        if self.held > 2 * self.size:
            self._tighten()

    def _tighten(self) -> None:
        held = torch.cat(self.above)
        if held.numel() >= self.size:
            bound = float(held.topk(self.size, sorted=False).values.min())
            self.equal = self.equal if bound == self.bound else 0
            self.bound = bound
        self.equal += int((held == self.bound).sum())
        self.above = [held[held > self.bound]]
        self.held = self.above[0].numel()

    def found(self) -> tuple[float, int] | None:
        """The number, and how many are at least as large; None if there are fewer than ``size``."""
        if self.above:
            self._tighten()
        count = self.held + self.equal
        return (self.bound, count) if count >= self.size else None


def _search(
    sae: FastSAE, source: _Rows, wanted: float, shown: Callable[[float], None]
) -> tuple[float, int, int]:
    """The threshold, how many codes lie above it, and the rows without outliers."""
    guess = _guess(sae, source, wanted)
    while True:
        strongest = _Strongest(max(1, round(wanted * source.total)), guess)
        rows = 0
        for x, seen in source:
            sae.threshold = torch.tensor(_below(strongest.bound), device=sae.device)
            strongest.add(sae.encode_sparse(x).values)
            rows += x.shape[0]
            shown(seen)
        if rows == 0:
            raise ValueError(f"{source.shards.folder}: no rows to calibrate on")
        # Outliers are known only now: what was held was enough for more rows.
        strongest.size = max(1, round(wanted * rows))
        found = strongest.found()
        if found is not None:
            return _below(found[0]), found[1], rows
        if guess == 0.0:  # not so many codes above 0
            return 0.0, strongest.held + strongest.equal, rows
        guess = 0.0


def _guess(sae: FastSAE, source: _Rows, wanted: float) -> float:
    """A bound that is probably low enough: the one of four times the codes, in some rows."""
    for x, _ in source:
        pre_activations = sae.pre_activations(x[:_GUESS_ROWS]).float().flatten()
        count = round(4 * wanted * min(x.shape[0], _GUESS_ROWS))
        if not 0 < count < pre_activations.numel():
            return 0.0
        return max(0.0, float(pre_activations.topk(count, sorted=False).values.min()))
    return 0.0


def _below(value: float) -> float:
    """The next smaller float32, but not below 0: codes are what exceeds a threshold."""
    return max(0.0, float(torch.tensor(value).nextafter(torch.tensor(-math.inf))))
