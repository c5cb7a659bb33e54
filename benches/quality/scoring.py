"""What an SAE is worth: on held-out rows, and inside the model on held-out traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quality.data import LAYER, held_out_texts
from r1sae_fast import FastSAE
from r1sae_fast.evals import evaluate_in_model, evaluate_reconstruction
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import ActivationShards


def score(sae: FastSAE, held_out: ActivationShards, trained: ActivationShards) -> dict[str, Any]:
    """FVU, L0, dead features and the cross-entropy recovered, with codes chosen as in training:
    all at the same number of codes a row."""
    limit = 1e9  # nothing is left out: all are measured on the same rows
    with torch.no_grad():
        found = evaluate_reconstruction(
            sae, held_out, mode=sae.mode, batch_rows=2048, norm_limit=limit, progress=False
        )
        on_own = evaluate_reconstruction(
            sae, trained, mode=sae.mode, batch_rows=2048, norm_limit=limit, max_rows=65_536,
            progress=False,
        )  # fmt: skip
        engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32)
        inside = evaluate_in_model(
            sae, engine, held_out_texts(engine), LAYER, mode=sae.mode, norm_limit=limit,
            progress=False,
        )  # fmt: skip
    return {
        "fvu": found.fvu,
        "fvu_on_training_rows": on_own.fvu,
        "l0": found.l0,
        "dead": on_own.dead_fraction,
        "ce_clean": inside.ce_clean,
        "ce_sae": inside.ce_sae,
        "ce_recovered": inside.ce_recovered_zero,
        "ce_recovered_mean": inside.ce_recovered_mean,
        "kl": inside.kl_sae,
    }


def load(folder: Path) -> FastSAE:
    """An SAE as it was saved."""
    sae: FastSAE = FastSAE.load(folder)
    return sae
