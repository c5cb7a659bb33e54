"""Transcoders: codes of one activation that make another one, such as a block's MLP's output from
its input (https://arxiv.org/abs/2406.11944), with a skip connection where asked for
(https://arxiv.org/abs/2501.18823).

Whatever finds the codes, ``reconstruction = codes @ W_dec + b_dec`` becomes, of a row x with the
target y,

    y' = codes(x) @ W_dec + b_dec + x @ W_skip.T        loss: |y' - y|^2

An autoencoder is the case y = x without W_skip. The encoder's gradient comes from x, the others'
from the error ``y' - y`` alone, so the sparse sums are the autoencoder's: what is added is
``W_skip``'s gradient, ``error.T @ x``. W_skip begins at zero, where it makes nothing worse.
"""

from __future__ import annotations

from torch import Tensor

from r1sae_fast.train.losses.base import Parameters, Sae

SKIP = "skip"
"""Of the parameters: W_skip, ``[d_in, d_in]``, of target numbers by numbers of x."""


def base(parameters: Parameters, x: Tensor) -> Tensor:
    """What is made without codes: ``[d_in]``, or ``[rows, d_in]`` with a skip connection."""
    skip = parameters.get(SKIP)
    return parameters["b_dec"] if skip is None else parameters["b_dec"] + x @ skip.T


def error(sae: Sae, decoded: Tensor, x: Tensor, target: Tensor | None) -> Tensor:
    """``[rows, d_in]``: what codes, decoded, bias and skip make of ``x``, minus ``target`` (None:
    x). Written over ``decoded``."""
    made, skip = decoded.add_(sae.parameters["b_dec"]), sae.parameters.get(SKIP)
    if skip is not None:
        made.addmm_(x, skip.T)
    return made.sub_(x if target is None else target)


def gradient_of_skip(of_b_dec: Tensor, x: Tensor, scale: float) -> Tensor:
    """``[d_in, d_in]``, from the gradient rows whose sum is b_dec's, ``[rows, d_in]``."""
    return (of_b_dec.T @ x).mul_(scale)
