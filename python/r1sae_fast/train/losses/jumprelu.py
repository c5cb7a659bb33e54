"""JumpReLU (https://arxiv.org/abs/2407.14435): a feature's codes exceed its learned threshold.

Which pre-activations exceed the threshold has no gradient, so the threshold's is estimated (the
paper's straight-through estimators): a pre-activation z within half a ``bandwidth`` e of theta
counts, by a rectangle kernel, for the density of them at theta,

    d JumpReLU(z) / d theta ~ -theta / e     d step(z) / d theta ~ -1 / e     |z - theta| < e / 2

so the threshold rises where codes near it do not earn their penalty. Penalties, of a row, in units
in which x has mean norm 1 (the paper's), as are e and s:

- "target": ``c * (L0 / k - 1)^2`` with the batch's mean L0 (the paper's loss for a given L0);
- "l0": ``c * L0``, the paper's first choice;
- "tanh": ``c * sum of tanh(s * code)``, which also pulls at the codes themselves
  (https://transformer-circuits.pub/2025/january-update).

Optimised is ``log_threshold``, so that theta stays positive. Other than in the paper's code only
positive pre-activations are near: zeros that relu made say nothing about the density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.losses import transcoder
from r1sae_fast.train.losses.base import (
    Definition,
    Forward,
    Parameters,
    Part,
    Sae,
    decoder,
    only,
    pre_activations,
)
from r1sae_fast.train.sums import sum_of_squares


def definition(
    parameters: Parameters,
    x: Tensor,
    config: TrainConfig,
    share: float,
    target: Tensor | None = None,
) -> Definition:
    """The loss as the paper has it, dense: the truth. ``share`` of the penalty is in force."""
    pre, theta = pre_activations(parameters, x), parameters["log_threshold"].exp()
    unit = math.sqrt(x.shape[1])
    codes: Tensor = _JumpReLU.apply(pre, theta, config.width * unit)
    steps: Tensor = _Step.apply(pre, theta, config.width * unit)
    aim = x if target is None else target
    reconstruction = codes @ decoder(parameters) + transcoder.base(parameters, x)
    squared = (reconstruction - aim).square().mean()
    l0 = steps.sum(1).mean()
    if config.sparsity == "target":
        penalty = (l0 / config.needed_k - 1.0).square()
    elif config.sparsity == "l0":
        penalty = l0
    else:
        penalty = (config.slope / unit * codes).tanh().sum(1).mean()
    return Definition(squared + share * config.penalty * penalty, reconstruction, pre)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return pre * _kept(pre, theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pre, theta = ctx.saved_tensors
        near = _near(pre, theta, ctx.width)
        of_theta = -(theta / ctx.width) * (near * gradient).sum(0)
        return gradient * _kept(pre, theta), of_theta, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return _kept(pre, theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pre, theta = ctx.saved_tensors
        near = _near(pre, theta, ctx.width)
        return None, -(near * gradient).sum(0) / ctx.width, None


def _kept(pre: Tensor, theta: Tensor) -> Tensor:
    return (pre > 0) & (pre > theta)


def _near(pre: Tensor, theta: Tensor, width: float) -> Tensor:
    return (pre > 0) & (pre > theta - width / 2) & (pre < theta + width / 2)


def forward(
    sae: Sae, x: Tensor, config: TrainConfig, share: float, target: Tensor | None = None
) -> Forward:
    """The loss of standardised rows ``x [rows, d_in]``, with ``share`` of the penalty.

    Two parts: what is kept, and what is near its threshold but not kept.
    """
    theta, unit = sae.parameters["log_threshold"].exp(), math.sqrt(x.shape[1])
    found = sae.find.threshold(x, theta - config.width * unit / 2, check_finite=False)
    kept = found.values > theta[found.indices.long()]
    codes, below = only(found, kept), only(found, ~kept)
    error = transcoder.error(sae, sae.decode(codes), x, target)
    squared = sum_of_squares(error)
    coefficient, slope = share * config.penalty / x.shape[0], config.slope / unit
    of_codes = of_below = None
    if config.sparsity == "tanh":
        bent = (slope * codes.values).tanh()
        penalty = coefficient * sae.total(bent.sum())
        of_codes = coefficient * slope * (1.0 - bent.square())
        of_below = x.new_tensor(coefficient * slope)
    elif config.sparsity == "l0":
        penalty = x.new_tensor(coefficient * sae.total(codes.nnz))
    else:
        missed = sae.total(codes.nnz) / x.shape[0] / config.needed_k - 1.0
        penalty = x.new_tensor(coefficient * x.shape[0] * missed**2)
    parts = [Part(codes, error, of_codes), Part(below, error, of_below, learns=False)]
    return Forward(codes, squared / x.numel() + penalty, error, squared, parts, error, found.nnz)


def gradient_of_log_threshold(
    sae: Sae, found: Forward, of_values: list[Tensor], config: TrainConfig, share: float
) -> Tensor:
    """``[d_sae]``, from the gradients of the two parts' values."""
    theta = sae.parameters["log_threshold"].exp()
    width = config.width * math.sqrt(found.error.shape[1])
    of_step = _gradient_of_step(found, sae.total(found.fired.nnz), config, share)
    result = torch.zeros_like(theta)
    for part, of_value in zip(found.parts, of_values, strict=True):
        features = part.codes.indices.long()
        here = theta[features]
        near = part.codes.values < here + width / 2
        of_theta = -(here * of_value + of_step) / width
        result.index_add_(0, features, near * of_theta)
    return result.mul_(theta)


def _gradient_of_step(found: Forward, fired: float, config: TrainConfig, share: float) -> float:
    """Of the penalty in whether a pre-activation is kept, the same for all of the ``fired``."""
    if config.sparsity == "tanh":
        return 0.0
    coefficient = share * config.penalty / found.error.shape[0]
    if config.sparsity == "l0":
        return coefficient
    l0 = fired / found.error.shape[0]
    return coefficient * 2.0 * (l0 / config.needed_k - 1.0) / config.needed_k


def first_log_threshold(
    sae: Sae, x: Tensor, config: TrainConfig, least: Callable[[float], float] = float
) -> float:
    """With which rows ``x`` get so many codes as the run begins with.

    A threshold that all features share and that is far off takes Adam thousands of steps to mend,
    and below a half bandwidth every positive pre-activation is near it. ``least`` is that over
    all features of numbers of own ones.
    """
    wanted = config.first_l0
    codes = sae.find.batch_topk(x, wanted, check_finite=False)
    smallest = least(float(codes.values.min()) if codes.nnz else math.inf)
    return math.log(max(smallest, 1e-6)) if math.isfinite(smallest) else 0.0
