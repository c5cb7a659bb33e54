"""How well an SAE does on shards."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.progress import progress_bar
from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train.standardise import checked

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Figures over all rows together."""

    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the mean row."""
    l0: float
    """Mean codes a row."""
    dead_fraction: float
    """Features that fired on no row."""
    density: Tensor
    """``[d_sae]`` float64: share of the rows on which each feature fired."""
    rows: int
    """Rows that were counted."""
    left_out: int
    """Rows that were not, as outliers."""
    mode: str
    """How codes were chosen."""

    @property
    def explained_variance(self) -> float:
        """``1 - fvu``."""
        return 1.0 - self.fvu


@torch.no_grad()
def evaluate(
    sae: FastSAE,
    shards: ActivationShards | str | os.PathLike[str],
    *,
    batch_rows: int = 4096,
    max_rows: int | None = None,
    norm_limit: float | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """FVU, L0, dead features and densities of ``sae`` in its present mode.

    Args:
        sae: on any device.
        shards: what to measure on; best rows that were not trained on.
        batch_rows: rows at a time; in mode "batch_topk" this has a say in the codes.
        max_rows: at most so many, drawn from all; default all, in order.
        norm_limit: leave out rows of a larger norm; default what training left out (the SAE's
            metadata tell), else none. A single outlier can hold most of the variance.
        progress: show a bar on stderr; default if that is a terminal.

    Raises:
        ValueError: no rows to count, or another d_in.
        NonFiniteError: a NaN or infinite activation.
    """
    if not isinstance(shards, ActivationShards):
        shards = ActivationShards(shards)
    if shards.d_in != sae.d_in:
        raise ValueError(f"the shards have d_in = {shards.d_in}, the SAE {sae.d_in}")
    if norm_limit is None:
        norm_limit = float(sae.metadata.get("norm_limit", math.inf))
    total = len(shards) if max_rows is None else min(max_rows, len(shards))
    loader = shards.loader(min(batch_rows, max(total, 1)), shuffle=total < len(shards))
    # In float64: the variance is what is left of two large sums.
    sums = torch.zeros(sae.d_in, dtype=torch.float64, device=sae.device)
    squares = error = 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    seen = rows = codes_in_all = 0
    with progress_bar("evaluating", total, unit="rows", shown=progress) as shown:
        for batch in loader:
            if seen >= total:
                break
            x, norms = checked(batch)
            x, norms = x[: total - seen], norms[: total - seen]
            seen += x.shape[0]
            x = x[norms <= norm_limit].to(sae.device)
            reconstruction, codes = sae(x)
            wide = x.double()
            sums += wide.sum(0)
            squares += float(wide.square().sum())
            error += float((wide - reconstruction.double()).square().sum())
            fired += torch.bincount(codes.indices, minlength=sae.d_sae)
            codes_in_all += codes.nnz
            rows += x.shape[0]
            shown(seen)
    if rows == 0:
        raise ValueError(f"{shards.folder}: no rows to evaluate on")
    variance = squares - float(sums.square().sum()) / rows
    return Evaluation(
        fvu=error / variance if variance > 0 else math.nan,
        l0=codes_in_all / rows,
        dead_fraction=float((fired == 0).double().mean()),
        density=fired.cpu().double() / rows,
        rows=rows,
        left_out=seen - rows,
        mode=sae.mode,
    )
