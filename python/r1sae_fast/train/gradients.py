"""The sparse half of a step: decode, and gradients that never make a ``[rows, d_sae]`` tensor.

Written with ``embedding_bag``, which is a CSR matrix times a dense one: a row's codes pick the
decoder's rows; sorted by feature instead, a feature's codes pick the activations' rows. Each output
row is summed by one thread in a fixed order, so that results do not depend on scheduling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows(NamedTuple):
    """Codes in compressed rows; ``features`` and ``offsets`` int64, ``offsets`` with both ends."""

    values: Tensor
    features: Tensor
    offsets: Tensor


class SparseGradients(NamedTuple):
    """Gradients of the weights, feature by feature: both matrices ``[d_sae, d_in]``."""

    encoder: Tensor
    decoder: Tensor
    b_enc: Tensor


def decode(codes: Rows, decoder: Tensor) -> Tensor:
    """``codes @ decoder`` without a bias: ``[rows, d_in]``."""
    return _combine(codes.features, codes.offsets, codes.values, decoder)


def backward(codes: Rows, x: Tensor, decoder: Tensor, gradient: Tensor) -> SparseGradients:
    """Gradients of the weights from that of the reconstruction.

    Args:
        codes: of ``rows`` rows; all values positive, so that relu passes every gradient.
        x: ``[rows, d_in]``, what was encoded.
        decoder: ``[d_sae, d_in]``.
        gradient: ``[rows, d_in]``, of the loss by the reconstruction.
    """
    d_sae = decoder.shape[0]
    of_values = _gradient_of_values(codes, decoder, gradient)
    order = codes.features.argsort(stable=True)
    rows = torch.repeat_interleave(codes.offsets.diff(), output_size=codes.features.shape[0])[order]
    counts = torch.bincount(codes.features, minlength=d_sae)
    by_feature = F.pad(counts.cumsum(0), (1, 0))
    return SparseGradients(
        encoder=_combine(rows, by_feature, of_values[order], x),
        decoder=_combine(rows, by_feature, codes.values[order], gradient),
        b_enc=of_values.new_zeros(d_sae).index_add_(0, codes.features, of_values),
    )


def _combine(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    if indices.numel() == 0:  # embedding_bag wants at least one
        return table.new_zeros(offsets.shape[0] - 1, table.shape[1])
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _gradient_of_values(codes: Rows, decoder: Tensor, gradient: Tensor) -> Tensor:
    """Of each code the dot product of its row's gradient with its feature's decoder row."""
    if codes.values.numel() == 0:
        return codes.values
    # Autograd has a kernel for it that gathers nothing: [codes, d_in] would be larger than all.
    with torch.enable_grad():
        values = codes.values.detach().requires_grad_()
        output = _combine(codes.features, codes.offsets, values, decoder)
    (result,) = torch.autograd.grad(output, values, gradient)
    return result
