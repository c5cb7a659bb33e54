"""Gradients of encoding and decoding for who doesn't want the matrices' written out.

As :func:`ops.with_gradient` and :func:`ops.decode`, but the gradient of the matrix goes, as what it
is a sum of (see :mod:`r1sae_fast.optim.factored`), to a function instead of autograd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops import _common
from r1sae_fast.ops.decode import _decode
from r1sae_fast.optim.factored import Leave

__all__ = ["decode_in_factors", "encode_in_factors", "feature_lists", "gradient_of_values"]


def gradient_of_values(lists: _core.FeatureLists, gradient: Tensor, W_dec: Tensor) -> Tensor:
    """Of each code the inner product of its row of ``gradient`` with its feature's row of W_dec.

    The gradient of decoding in the codes' values, feature by feature; float32 on the CPU.

    Args:
        lists: the codes by feature.
        gradient: ``[rows, d_in]``.
        W_dec: ``[d_sae, d_in]``.

    Returns:
        ``[nnz]``, in order of rows; no gradient flows.
    """
    return _common.from_rust(
        _core.gradient_of_values_by_feature(
            _common.to_rust(gradient),
            lists,
            _common.to_rust(W_dec),
            _common.threads(lists.nnz * W_dec.shape[1]),
        )
    )


def encode_in_factors(
    codes: SparseCodes, x: Tensor, W_features: Tensor, b_enc: Tensor, leave: Leave
) -> SparseCodes:
    """:func:`ops.with_gradient`, but ``leave`` gets W_features' gradient, in factors."""
    values: Tensor = _Encoding.apply(
        x.reshape(codes.rows, x.shape[-1]), W_features, b_enc, codes.values, codes.indices,
        codes.row_offsets, leave,
    )  # fmt: skip
    return replace(codes, values=values)


class _Encoding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_features: Tensor,
        b_enc: Tensor,
        values: Tensor,
        indices: Tensor,
        row_offsets: Tensor,
        leave: Leave,
    ) -> Tensor:
        ctx.save_for_backward(x, W_features, indices, row_offsets)
        ctx.leave = leave
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W_features, indices, row_offsets = ctx.saved_tensors
        lists = feature_lists(indices, row_offsets, W_features.shape[0])
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _decode(gradient, indices, row_offsets, W_features, None)
        if ctx.needs_input_grad[1]:
            ctx.leave(lists, gradient, x)
        if ctx.needs_input_grad[2]:
            of_bias = torch.from_numpy(lists.sums(_common.to_rust(gradient)))
        return of_x, None, of_bias, None, None, None, None


def decode_in_factors(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, leave: Leave
) -> Tensor:
    """:func:`r1sae_fast.ops.decode`, but ``leave`` gets W_dec's gradient, in factors."""
    output: Tensor = _Decoding.apply(codes.values, W_dec, codes.indices, codes.row_offsets, leave)
    if b_dec is not None:
        output = output + b_dec
    return output.reshape(*codes.shape[:-1], W_dec.shape[1])


class _Decoding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, indices: Tensor, row_offsets: Tensor, leave: Leave
    ) -> Tensor:
        ctx.save_for_backward(values, W_dec, indices, row_offsets)
        ctx.leave = leave
        output: Tensor = _decode(values, indices, row_offsets, W_dec, None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec, indices, row_offsets = ctx.saved_tensors
        lists = feature_lists(indices, row_offsets, W_dec.shape[0])
        of_values = None
        if ctx.needs_input_grad[0]:
            of_values = gradient_of_values(lists, gradient, W_dec)
        if ctx.needs_input_grad[1]:
            ctx.leave(lists, values, gradient)
        return of_values, None, None, None, None


def feature_lists(indices: Tensor, row_offsets: Tensor, d_sae: int) -> _core.FeatureLists:
    """The codes by feature."""
    return _core.FeatureLists(_common.to_rust(indices), _common.to_rust(row_offsets), d_sae)
