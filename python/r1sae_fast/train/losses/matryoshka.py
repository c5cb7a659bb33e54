"""Matryoshka BatchTopK (https://arxiv.org/abs/2503.17547): the first features must do alone.

Codes are those of BatchTopK over all features. The loss is the sum, over the nested prefixes of the
features, of the squared error of what that prefix's codes make of a row: general features come
first, since the small prefixes have room for nothing else, and later ones need not be split from
them.

A code of a feature between the prefixes g-1 and g has a part in the reconstructions of g and of all
wider ones, so the gradient of what it makes is the sum of their errors. Every code belongs to one
such level: the gradients take as much work as BatchTopK's, and one array of rows a level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.losses import topk, transcoder
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


def definition(
    parameters: Parameters,
    x: Tensor,
    config: TrainConfig,
    share: float,
    target: Tensor | None = None,
) -> Definition:
    """The loss as the paper has it, dense: the truth."""
    del share
    pre = pre_activations(parameters, x)
    codes, loss = topk.kept(pre, config), x.new_zeros(())
    aim, base = x if target is None else target, transcoder.base(parameters, x)
    for width in config.prefixes:
        prefix = codes[:, :width] @ decoder(parameters)[:width] + base
        loss = loss + (prefix - aim).square().mean()
    return Definition(loss, prefix, pre)


def forward(
    sae: Sae, x: Tensor, config: TrainConfig, share: float, target: Tensor | None = None
) -> Forward:
    """The loss of standardised rows ``x [rows, d_in]``; ``share`` has no say in it."""
    del share
    codes = topk.find(sae, x, config)
    levels = split(codes, config.prefixes, sae.first)
    error, errors = transcoder.error(sae, torch.zeros_like(x), x, target), []
    for level in levels:
        error = sae.decode(level).add_(error)
        errors.append(error)
    squares = torch.stack([one.square().sum() for one in errors])
    sums = [error]
    for wider in reversed(errors[:-1]):
        sums.insert(0, wider.add_(sums[0]))
    parts = [Part(*both) for both in zip(levels, sums, strict=True)]
    return Forward(codes, squares.sum() / x.numel(), error, squares[-1], parts, sums[0], codes.nnz)


def split(codes: SparseCodes, prefixes: tuple[int, ...], first: int = 0) -> list[SparseCodes]:
    """The codes of each level, in order: of features from the width before up to its own.
    ``first`` is the number of the codes' first feature."""
    bounds = torch.tensor(prefixes, device=codes.device) - first
    level = torch.bucketize(codes.indices, bounds, right=True)
    return [only(codes, level == number) for number in range(len(prefixes))]
