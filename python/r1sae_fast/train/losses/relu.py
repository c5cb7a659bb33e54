"""ReLU with an L1 penalty: the baseline that the other architectures are measured against.

Of each row, ``|x - reconstruction|^2 + c * sum of codes`` in units in which x has mean norm 1, with
decoder rows of norm 1 so that codes can't be made small at no cost (Bricken et al. 2023,
https://transformer-circuits.pub/2023/monosemantic-features). The penalty shrinks all codes alike,
which is what the others were made to avoid.

Every positive pre-activation is a code, at first half of all: until few are left, dense products do
the work (see ``DENSE_SHARE`` in :mod:`r1sae_fast.train.gradients`).
"""

from __future__ import annotations

import math

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
    pre = pre_activations(parameters, x)
    codes = pre.relu()
    aim = x if target is None else target
    reconstruction = codes @ decoder(parameters) + transcoder.base(parameters, x)
    squared = (reconstruction - aim).square().mean()
    penalty = codes.sum(1).mean() / math.sqrt(x.shape[1])
    return Definition(squared + share * config.penalty * penalty, reconstruction, pre)


def forward(
    sae: Sae, x: Tensor, config: TrainConfig, share: float, target: Tensor | None = None
) -> Forward:
    """The loss of standardised rows ``x [rows, d_in]``, with ``share`` of the penalty."""
    codes = sae.find.threshold(x, 0.0, check_finite=False)
    error = transcoder.error(sae, sae.decode(codes), x, target)
    squared = sum_of_squares(error)
    of_a_code = share * config.penalty / (x.shape[0] * math.sqrt(x.shape[1]))
    loss = squared / x.numel() + of_a_code * sae.total(codes.values.sum())
    part = Part(codes, error, extra=x.new_tensor(of_a_code))
    return Forward(codes, loss, error, squared, [part], error, codes.nnz)
