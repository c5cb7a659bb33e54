"""Sparse codes times ``W_dec``, plus ``b_dec``: each code reads one row of ``W_dec``.

The gradients are sparse too: that of a value is one inner product, that of ``W_dec`` a sum over
the codes of each feature, so nothing of size rows x d_sae is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops import _common

__all__ = ["decode", "decode_reference"]


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """``codes @ W_dec + b_dec``, summed in float32 (float64 for float64).

    Args:
        codes: of shape ``[..., d_sae]``.
        W_dec: ``[d_sae, d_in]``, of the dtype of the codes.
        b_dec: ``[d_in]``, likewise; default none.

    Returns:
        ``[..., d_in]``; differentiable in ``codes.values``, ``W_dec`` and ``b_dec``.

    Raises:
        TypeError: dtypes that differ.
        ValueError: shapes or devices that don't fit, or codes out of range.
    """
    if W_dec.dim() != 2 or W_dec.shape[0] != codes.d_sae:
        raise ValueError(f"W_dec has shape {tuple(W_dec.shape)}; expected ({codes.d_sae}, d_in)")
    if b_dec is not None and tuple(b_dec.shape) != (W_dec.shape[1],):
        raise ValueError(f"b_dec has shape {tuple(b_dec.shape)}; expected ({W_dec.shape[1]},)")
    for name, tensor in (("W_dec", W_dec), ("b_dec", b_dec)):
        if tensor is None:
            continue
        if tensor.dtype != codes.dtype:
            raise TypeError(
                f"the codes are {codes.dtype} but {name} {tensor.dtype}; "
                f"use codes.to({tensor.dtype})"
            )
        if tensor.device != codes.device:
            raise ValueError(
                f"the codes lie on {codes.device} but {name} on {tensor.device}; move one of them"
            )
    output: Tensor = _decode(codes.values, codes.indices, codes.row_offsets, W_dec, b_dec)
    return output.reshape(*codes.shape[:-1], W_dec.shape[1])


def decode_reference(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """The truth, in plain torch: the dense product, ``[rows, d_in]``."""
    dense = _dense(values, indices, row_offsets, W_dec.shape[0])
    output = dense @ W_dec
    return output if b_dec is None else output + b_dec


def _dense(values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int) -> Tensor:
    dense = values.new_zeros(row_offsets.shape[0] - 1, d_sae)
    return dense.index_put((_common.rows_of(indices, row_offsets), indices.long()), values)


@torch.library.custom_op("r1sae_fast::decode", mutates_args=())
def _decode(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    return decode_reference(values, indices, row_offsets, W_dec, b_dec)


@_decode.register_kernel("cpu")
def _(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    if not _common.in_rust(values, W_dec, b_dec):
        return decode_reference(values, indices, row_offsets, W_dec, b_dec)
    output = _core.decode(
        _common.to_rust(values),
        _common.to_rust(indices),
        _common.to_rust(row_offsets),
        _common.to_rust(W_dec),
        None if b_dec is None else _common.to_rust(b_dec),
        _common.threads(),
    )
    return _common.from_rust(output).reshape(row_offsets.shape[0] - 1, W_dec.shape[1])


@_decode.register_fake
def _(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    return values.new_empty(row_offsets.shape[0] - 1, W_dec.shape[1])


@torch.library.custom_op("r1sae_fast::decode_gradient_of_values", mutates_args=())
def _gradient_of_values(
    gradient: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor
) -> Tensor:
    return (gradient @ W_dec.T)[_common.rows_of(indices, row_offsets), indices.long()]


@_gradient_of_values.register_kernel("cpu")
def _(gradient: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor) -> Tensor:
    if not _common.in_rust(gradient, W_dec):
        return (gradient @ W_dec.T)[_common.rows_of(indices, row_offsets), indices.long()]
    output = _core.decode_gradient_of_values(
        _common.to_rust(gradient),
        _common.to_rust(indices),
        _common.to_rust(row_offsets),
        _common.to_rust(W_dec),
        _common.threads(),
    )
    return _common.from_rust(output)


@_gradient_of_values.register_fake
def _(gradient: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor) -> Tensor:
    return gradient.new_empty(indices.shape[0])


@torch.library.custom_op("r1sae_fast::decode_gradient_of_weight", mutates_args=())
def _gradient_of_weight(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> Tensor:
    return _dense(values, indices, row_offsets, d_sae).T @ gradient


@_gradient_of_weight.register_kernel("cpu")
def _(gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int) -> Tensor:
    if not _common.in_rust(gradient, values):
        return _dense(values, indices, row_offsets, d_sae).T @ gradient
    output = _core.decode_gradient_of_weight(
        _common.to_rust(gradient),
        _common.to_rust(values),
        _common.to_rust(indices),
        _common.to_rust(row_offsets),
        d_sae,
        _common.threads(),
    )
    return _common.from_rust(output).reshape(d_sae, gradient.shape[1])


@_gradient_of_weight.register_fake
def _(gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int) -> Tensor:
    return gradient.new_empty(d_sae, gradient.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, row_offsets, W_dec, b_dec = inputs
    ctx.save_for_backward(values, indices, row_offsets, W_dec)
    ctx.has_bias = b_dec is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, row_offsets, W_dec = ctx.saved_tensors
    of_values = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_values = _gradient_of_values(gradient, indices, row_offsets, W_dec)
    if ctx.needs_input_grad[3]:
        of_weight = _gradient_of_weight(gradient, values, indices, row_offsets, W_dec.shape[0])
    if ctx.has_bias and ctx.needs_input_grad[4]:
        of_bias = gradient.sum(0)
    return of_values, None, None, of_weight, of_bias


_decode.register_autograd(_backward, setup_context=_save)
