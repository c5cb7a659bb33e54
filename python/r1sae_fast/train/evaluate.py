"""How well an SAE does on shards, as it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import ActivationShards, PairedShards

if TYPE_CHECKING:
    from r1sae_fast.evals import Reconstruction

__all__ = ["evaluate"]


def evaluate(
    sae: FastSAE,
    shards: ActivationShards | PairedShards | str | os.PathLike[str],
    *,
    batch_rows: int = 4096,
    max_rows: int | None = None,
    norm_limit: float | None = None,
    progress: bool | None = None,
) -> Reconstruction:
    """:func:`r1sae_fast.evals.evaluate_reconstruction` in the SAE's present mode."""
    from r1sae_fast.evals import evaluate_reconstruction  # which needs the engines as well

    return evaluate_reconstruction(
        sae,
        shards,
        mode=sae.mode,
        batch_rows=batch_rows,
        max_rows=max_rows,
        norm_limit=norm_limit,
        progress=progress,
    )
