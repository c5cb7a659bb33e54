"""The gradients of a step on the CPU, as sums over codes that are never written out.

The twin of :mod:`r1sae_fast.train.gradients`, which says what each of these is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops.decode import _gradient_of_values
from r1sae_fast.ops.sparse_grad import feature_lists, gradient_of_values
from r1sae_fast.optim import FactoredGradient
from r1sae_fast.train.gradients import (
    DENSE_SHARE,
    Auxiliary,
    Gradients,
    Weights,
    at_codes,
    is_dense,
    of_dense,
)
from r1sae_fast.train.losses.base import Part
from r1sae_fast.train.select import DenseFinder
from r1sae_fast.train.sums import sum_of_squares

_DENSE_SHARE = DENSE_SHARE
"""Of the dead features."""


def gradients(
    parts: list[Part],
    x: Tensor,
    weights: Weights,
    error: Tensor,
    scale: float,
    auxiliary: Auxiliary | None,
) -> tuple[Gradients[FactoredGradient], Tensor]:
    """As :func:`r1sae_fast.train.gradients.gradients`; ``x`` and the parts are kept, not copied."""
    d_sae, d_in = weights.decoder.shape
    encoder = FactoredGradient(d_sae, d_in)
    tied = weights.encoder is weights.decoder
    decoder = encoder if tied else FactoredGradient(d_sae, d_in)
    result = Gradients(encoder, decoder, torch.zeros(d_sae), [])
    for part in parts:
        result.of_values.append(_add(result, part, x, weights, scale))
    if auxiliary is None:
        return result, torch.zeros(())
    return result, _add_auxiliary(result, x, weights, error, auxiliary)


def _add(
    to: Gradients[FactoredGradient], part: Part, x: Tensor, weights: Weights, scale: float
) -> Tensor:
    """Adds what ``scale`` times the part's gradient makes of its codes; returns their values'."""
    if part.learns and is_dense(part.codes):
        return _add_dense(to, part, x, weights.decoder, scale)
    codes, gradient = part.codes, part.gradient
    lists = feature_lists(codes.indices, codes.row_offsets, weights.decoder.shape[0])
    if weights.rounded_decoder is None:
        of_values = gradient_of_values(lists, gradient, weights.decoder).mul_(scale)
    else:
        where = (codes.indices, codes.row_offsets)
        of_values = _gradient_of_values(gradient, *where, weights.rounded_decoder).mul_(scale)
    if part.extra is not None:
        of_values += part.extra
    if not part.learns:
        return of_values
    to.encoder.add(lists, of_values, x)
    to.decoder.add(lists, scale * codes.values, gradient)
    to.b_enc.add_(torch.from_numpy(lists.sums(of_values.numpy())))
    return of_values


def _add_dense(
    to: Gradients[FactoredGradient], part: Part, x: Tensor, decoder: Tensor, scale: float
) -> Tensor:
    wide, kept = of_dense(part, decoder, scale)
    of_values = at_codes(wide, part.codes)
    # The other features are other parts', or dead.
    features = (kept > 0).any(0).nonzero().flatten()
    wide, kept = wide[:, features], kept[:, features].mul_(scale)
    to.b_enc[features] += wide.sum(0)
    if to.decoder is to.encoder:
        to.encoder.add_product(features, torch.cat([wide, kept]), torch.cat([x, part.gradient]))
    else:
        to.encoder.add_product(features, wide, x)
        to.decoder.add_product(features, kept, part.gradient)
    return of_values


def _add_auxiliary(
    to: Gradients[FactoredGradient], x: Tensor, weights: Weights, error: Tensor, by: Auxiliary
) -> Tensor:
    dead, decoder = by.dead, weights.decoder[by.dead]
    own = DenseFinder(weights.encoder[dead], weights.b_enc[dead])
    codes = by.ranks.finder(own, len(dead)).topk(x, by.k, check_finite=False)
    dense = codes.nnz > _DENSE_SHARE * codes.rows * codes.d_sae
    kept = codes.to_dense() if dense else None

    def decode(some: SparseCodes) -> Tensor:
        if kept is None:
            return ops.decode(some, decoder)
        return (kept if some is codes else some.to_dense()) @ decoder

    missed = by.ranks.decoded(decode, codes).add_(error)
    size = sum_of_squares(error).clamp_min(torch.finfo(error.dtype).tiny)
    loss = sum_of_squares(missed) / size
    scale = by.coefficient * 2.0 / float(size)
    if kept is None:
        features = dead[codes.indices.long()].to(torch.int32)
        d_sae = weights.decoder.shape[0]
        among_all = SparseCodes(codes.values, features, codes.row_offsets, d_sae)
        _add(to, Part(among_all, missed), x, weights._replace(rounded_decoder=None), scale)
        return loss
    of_values = (missed @ decoder.T).mul_(scale).mul_(kept > 0)
    to.b_enc[dead] += of_values.sum(0)
    kept.mul_(scale)
    if to.decoder is to.encoder:
        left, right = torch.cat([of_values, kept]), torch.cat([x, missed])
        to.encoder.add_product(dead, left, right)
    else:
        to.encoder.add_product(dead, of_values, x)
        to.decoder.add_product(dead, kept, missed)
    return loss
