"""What was trained as a :class:`FastSAE` for raw activations.

What standardisation is folded into is told in :mod:`r1sae_fast.train.standardise`. For a transcoder
x' = s (x - c) and the target's y' = t (y - a), so with r = s / t

    y' = relu(x' E + e) D + d + x' K.T
    y = relu(x (r E) + e / t - c (r E)) D + (d / t + a - c (r K).T) + x (r K).T

hence ``W_enc = r E``, ``W_dec = D``, ``W_skip = r K``; codes and threshold are in the units of y.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from r1sae_fast.sae import FastSAE, Mode
from r1sae_fast.train.losses import transcoder
from r1sae_fast.train.standardise import Standardisation
from r1sae_fast.train.step import Learner

__all__ = ["as_sae", "thresholds"]

_ROWS = 1024
"""In float64 at once."""

_ENCODES = {"matryoshka": "batch_topk", "jumprelu": "threshold", "relu": "threshold"}
"""In which mode the SAE encodes, where that is not the mode it was trained in."""


def thresholds(learner: Learner, parameters: dict[str, Tensor], by: Standardisation) -> Tensor:
    """Of the SAE, ``[]``, or one for each of the parameters' features, in the units of raw codes;
    0 before the first step."""
    scale = (by.target or by).scale
    if "log_threshold" in parameters:
        return parameters["log_threshold"].detach().cpu().exp() / scale
    return torch.tensor((learner.mean_threshold or 0.0) / scale)


def as_sae(learner: Learner, weights: dict[str, Tensor], by: Standardisation) -> FastSAE:
    """The SAE with standardisation folded in; see :mod:`r1sae_fast.train.standardise`.

    Args:
        learner: whose figures and settings these are.
        weights: its parameters, of all features, on the CPU.
        by: what the rows it was trained on were standardised by.
    """
    config, aim = learner.config, by.target or by
    encoder, skip = weights["encoder"], weights.get(transcoder.SKIP)
    if by.target is not None:
        encoder = encoder * (by.scale / aim.scale)
    sae = FastSAE(
        learner.d_in,
        config.d_sae,
        _k(learner),
        cast(Mode, _ENCODES.get(config.mode, config.mode)),
        tied=config.tied,
        transcoder=by.target is not None,
        skip_connection=skip is not None,
        dtype=torch.float32,
    )
    with torch.no_grad():
        sae.W_dec.copy_(weights.get("decoder", encoder))
        if not config.tied:
            sae.W_enc.copy_(encoder.T)
        # In float64: centre @ encoder is a sum of large terms that nearly cancel.
        shift = torch.cat(
            [part.double() @ by.centre.double() for part in torch.split(encoder, _ROWS)]
        ).float()
        sae.b_enc.copy_(weights["b_enc"] / aim.scale - shift)
        sae.b_dec.copy_(weights["b_dec"] / aim.scale + aim.centre)
        if skip is not None and sae.W_skip is not None:
            sae.W_skip.copy_(skip * (by.scale / aim.scale))
            sae.b_dec.sub_((sae.W_skip.double() @ by.centre.double()).float())
        if config.penalised or learner.mean_threshold is not None:
            sae.threshold = thresholds(learner, weights, by)
    return sae


def _k(learner: Learner) -> int:
    """The SAE's k; where a penalty decides about codes, as many as the last batch had."""
    if learner.config.k is not None:
        return learner.config.k
    return min(max(1, round(learner.l0)), learner.config.d_sae)
