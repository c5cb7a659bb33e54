"""What was trained as a :class:`FastSAE` for raw activations."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from r1sae_fast.sae import FastSAE, Mode
from r1sae_fast.train.standardise import Standardisation
from r1sae_fast.train.step import Learner

__all__ = ["as_sae", "thresholds"]

_ENCODES = {"matryoshka": "batch_topk", "jumprelu": "threshold", "relu": "threshold"}
"""In which mode the SAE encodes, where that is not the mode it was trained in."""


def thresholds(learner: Learner, parameters: dict[str, Tensor], by: Standardisation) -> Tensor:
    """Of the SAE, ``[]``, or one for each of the parameters' features, in the units of raw codes;
    0 before the first step."""
    if "log_threshold" in parameters:
        return parameters["log_threshold"].detach().cpu().exp() / by.scale
    return torch.tensor((learner.mean_threshold or 0.0) / by.scale)


def as_sae(learner: Learner, weights: dict[str, Tensor], by: Standardisation) -> FastSAE:
    """The SAE with standardisation folded in; see :mod:`r1sae_fast.train.standardise`.

    Args:
        learner: whose figures and settings these are.
        weights: its parameters, of all features, on the CPU.
        by: what the rows it was trained on were standardised by.
    """
    config, scale, centre = learner.config, by.scale, by.centre
    encoder = weights["encoder"]
    sae = FastSAE(
        learner.d_in,
        config.d_sae,
        _k(learner),
        cast(Mode, _ENCODES.get(config.mode, config.mode)),
        tied=config.tied,
        dtype=torch.float32,
    )
    with torch.no_grad():
        sae.W_dec.copy_(weights.get("decoder", encoder))
        if not config.tied:
            sae.W_enc.copy_(encoder.T)
        # In float64: centre @ encoder is a sum of large terms that nearly cancel.
        shift = (encoder.double() @ centre.double()).float()
        sae.b_enc.copy_(weights["b_enc"] / scale - shift)
        sae.b_dec.copy_(weights["b_dec"] / scale + centre)
        if config.penalised or learner.mean_threshold is not None:
            sae.threshold = thresholds(learner, weights, by)
    return sae


def _k(learner: Learner) -> int:
    """The SAE's k; where a penalty decides about codes, as many as the last batch had."""
    if learner.config.k is not None:
        return learner.config.k
    return min(max(1, round(learner.l0)), learner.config.d_sae)
