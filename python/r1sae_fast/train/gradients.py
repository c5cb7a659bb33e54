"""The gradients of a step in plain torch, on any device; no ``[rows, d_sae]`` tensor is made.

Written with ``embedding_bag``, which is a CSR matrix times a dense one: a row's codes pick the
decoder's rows; sorted by feature instead, a feature's codes pick the activations' rows. Each output
row is summed by one thread in a fixed order, so that results do not depend on scheduling.

On the CPU :mod:`r1sae_fast.train.factored` takes their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from r1sae_fast.codes import SparseCodes
from r1sae_fast.optim import FactoredGradient
from r1sae_fast.train.losses.base import Part
from r1sae_fast.train.parallel import ALONE, Ranks
from r1sae_fast.train.select import DenseFinder

DENSE_SHARE = 0.05
"""From this share of features a row on, a matrix product beats sums over codes."""

Matrix = TypeVar("Matrix", Tensor, FactoredGradient)


class Weights(NamedTuple):
    """``encoder`` and ``decoder [d_sae, d_in]`` (the same tensor when tied), ``b_enc [d_sae]``."""

    encoder: Tensor
    decoder: Tensor
    b_enc: Tensor
    rounded_decoder: Tensor | None = None
    """In bfloat16, where steps compute with it (:mod:`r1sae_fast.train.mixed`)."""


class Auxiliary(NamedTuple):
    """The loss in which ``k`` dead features a row explain what the others left over."""

    dead: Tensor
    """``[n]`` int64, rising: own features without codes in this batch."""
    k: int
    """At most so many as there are dead features in all."""
    coefficient: float
    ranks: Ranks = ALONE
    """Who has the others."""


@dataclass(frozen=True)
class Gradients(Generic[Matrix]):
    """By weight; the decoder's is in the encoder's, and the same, where the SAE is tied."""

    encoder: Matrix
    decoder: Matrix
    b_enc: Tensor
    of_values: list[Tensor]
    """Of each part's codes, ``[nnz]`` each."""


def is_dense(codes: SparseCodes) -> bool:
    """Whether products of the dense codes are faster, as in the first steps of ReLU."""
    return codes.nnz > DENSE_SHARE * codes.rows * codes.d_sae


def of_dense(part: Part, decoder: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, d_sae]``: the gradients of a part's values, 0 where no code is, and the values."""
    kept = part.codes.to_dense()
    of_values = (part.gradient @ decoder.T).mul_(scale)
    if part.extra is not None:
        extra = part.extra
        of_values += replace(part.codes, values=extra).to_dense() if extra.dim() else extra
    return of_values.mul_(kept > 0), kept


def at_codes(dense: Tensor, codes: SparseCodes) -> Tensor:
    """``dense [rows, d_sae]`` at the codes: ``[nnz]``."""
    return dense[codes.row_ids, codes.indices.long()]


def decode(codes: SparseCodes, decoder: Tensor) -> Tensor:
    """``codes @ decoder`` without a bias: ``[rows, d_in]``."""
    return _combine(codes.indices.long(), codes.row_offsets, codes.values, decoder)


def gradients(
    parts: list[Part],
    x: Tensor,
    weights: Weights,
    error: Tensor,
    scale: float,
    auxiliary: Auxiliary | None,
) -> tuple[Gradients[Tensor], Tensor]:
    """Gradients of the weights, and the auxiliary loss.

    Args:
        parts: disjoint codes of ``rows`` rows; all values positive, so that relu passes every
            gradient. ``scale`` times a part's gradient is that of the loss.
        x: ``[rows, d_in]``, what was encoded.
        error: ``[rows, d_in]``, reconstruction minus x: what ``auxiliary`` explains.
    """
    found = [_backward(part, x, weights.decoder, scale) for part in parts]
    learned = [one for one, part in zip(found, parts, strict=True) if part.learns]
    encoder, decoder, b_enc, _ = learned[0]
    for also in learned[1:]:
        encoder += also.encoder
        decoder += also.decoder
        b_enc += also.b_enc
    loss = error.new_zeros(())
    if auxiliary is not None:
        dead, k, coefficient, ranks = auxiliary
        part = weights.decoder[dead]
        find = ranks.finder(DenseFinder(weights.encoder[dead], weights.b_enc[dead]), len(dead))
        of_dead = find.topk(x, k, check_finite=False)
        # How much of the (constant) leftover, -error, they fail to explain, 1 being all of it.
        # b_dec takes no part: it is in the leftover.
        missed = ranks.decoded(lambda codes: decode(codes, part), of_dead).add_(error)
        size = error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)
        loss = missed.square().sum() / size
        more = _backward(Part(of_dead, missed), x, part, 2.0 / size)
        for mine, other in zip((encoder, decoder, b_enc), more[:3], strict=True):
            mine[dead] += coefficient * other
    if weights.encoder is weights.decoder:
        encoder.add_(decoder)
        decoder = encoder
    return Gradients(encoder, decoder, b_enc, [one.of_values for one in found]), loss


class _Backward(NamedTuple):
    encoder: Tensor
    decoder: Tensor
    b_enc: Tensor
    of_values: Tensor


def _backward(part: Part, x: Tensor, decoder: Tensor, scale: float | Tensor) -> _Backward:
    """What ``scale`` times the part's gradient makes of the weights'."""
    if part.learns and is_dense(part.codes):
        wide, kept = of_dense(part, decoder, scale)
        return _Backward(
            wide.T @ x, kept.T @ (part.gradient * scale), wide.sum(0), at_codes(wide, part.codes)
        )
    codes, gradient = part.codes, part.gradient * scale
    d_sae, features = decoder.shape[0], codes.indices.long()
    of_values = _gradient_of_values(codes, decoder, gradient)
    if part.extra is not None:
        of_values = of_values + part.extra
    if not part.learns:
        return _Backward(x, x, x, of_values)
    order = features.argsort(stable=True)
    rows = torch.repeat_interleave(codes.row_offsets.diff(), output_size=codes.nnz)[order]
    by_feature = F.pad(torch.bincount(features, minlength=d_sae).cumsum(0), (1, 0))
    return _Backward(
        _combine(rows, by_feature, of_values[order], x),
        _combine(rows, by_feature, codes.values[order], gradient),
        of_values.new_zeros(d_sae).index_add_(0, features, of_values),
        of_values,
    )


def _combine(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    if indices.numel() == 0:  # embedding_bag wants at least one
        return table.new_zeros(offsets.shape[0] - 1, table.shape[1])
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _gradient_of_values(codes: SparseCodes, decoder: Tensor, gradient: Tensor) -> Tensor:
    """Of each code the dot product of its row's gradient with its feature's decoder row."""
    if codes.nnz == 0:
        return codes.values
    # Autograd has a kernel for it that gathers nothing: [codes, d_in] would be larger than all.
    with torch.enable_grad():
        values = codes.values.detach().requires_grad_()
        output = _combine(codes.indices.long(), codes.row_offsets, values, decoder)
    (result,) = torch.autograd.grad(output, values, gradient)
    return result
