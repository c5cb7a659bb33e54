"""TopK and BatchTopK: the squared error of what the strongest codes make of a row.

TopK keeps the k strongest of each row (https://arxiv.org/abs/2406.04093), BatchTopK the
``k * rows`` strongest of all rows together (https://arxiv.org/abs/2412.06410). Which are kept has
no gradient; the number of codes is a setting, so that nothing need be paid for them.
"""

from __future__ import annotations

from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes
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
    """The loss as the papers have it, dense: the truth."""
    del share
    pre = pre_activations(parameters, x)
    aim = x if target is None else target
    reconstruction = kept(pre, config) @ decoder(parameters) + transcoder.base(parameters, x)
    return Definition((reconstruction - aim).square().mean(), reconstruction, pre)


def kept(pre: Tensor, config: TrainConfig) -> Tensor:
    """``pre [rows, d_sae]`` with zeros in place of what is not kept."""
    select = ops.topk if config.mode == "topk" else ops.batch_topk
    return pre * (select(pre.detach(), config.needed_k).to_dense() > 0)


def forward(
    sae: Sae, x: Tensor, config: TrainConfig, share: float, target: Tensor | None = None
) -> Forward:
    """The loss of standardised rows ``x [rows, d_in]``; ``share`` has no say in it."""
    del share
    codes = find(sae, x, config)
    error = transcoder.error(sae, sae.decode(codes), x, target)
    squared = sum_of_squares(error)
    parts = [Part(codes, error)]
    return Forward(codes, squared / x.numel(), error, squared, parts, error, codes.nnz)


def find(sae: Sae, x: Tensor, config: TrainConfig) -> SparseCodes:
    """The codes of ``x``. NaN is never one: the trainer looks for it in loss and weights."""
    select = sae.find.topk if config.mode == "topk" else sae.find.batch_topk
    return select(x, config.needed_k, check_finite=False)
