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

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

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
    stacked = by_level(codes, config.prefixes, sae.first)
    # One decoding for all levels: each call of its own has to wait for threads.
    made = sae.decode(stacked).view(len(config.prefixes), *x.shape)
    transcoder.error(sae, made[0], x, target)
    errors = made.unbind()
    for narrower, wider in pairwise(errors):
        wider.add_(narrower)
    squares = torch.linalg.vector_norm(made.flatten(1), dim=1).square()
    # In the errors' place what all from a level on sum up to; the last one stays.
    for wider, narrower in pairwise(reversed(errors)):
        narrower.add_(wider)
    parts = [
        Part(stacked[level * x.shape[0] : (level + 1) * x.shape[0]], total)
        for level, total in enumerate(errors)
    ]
    return Forward(
        codes, squares.sum() / x.numel(), errors[-1], squares[-1], parts, errors[0], codes.nnz
    )


def by_level(codes: SparseCodes, prefixes: tuple[int, ...], first: int = 0) -> SparseCodes:
    """The codes of each level, the rows of a level below those of the one before: ``levels *
    rows`` rows. A level has the features from the width before up to its own; ``first`` is the
    number of the codes' first feature."""
    bounds = torch.tensor(prefixes, device=codes.device, dtype=codes.indices.dtype) - first
    level = torch.bucketize(codes.indices, bounds, right=True, out_int32=True)
    row = level * codes.rows + codes.row_ids.to(torch.int32)
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=len(prefixes) * codes.rows)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return SparseCodes(codes.values[order], codes.indices[order], offsets, codes.d_sae)
