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
from r1sae_fast.ops._register import register
from r1sae_fast.ops.decoder_copy import COPY_DTYPES

__all__ = ["decode", "decode_reference"]


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """``codes @ W_dec + b_dec``, summed in float32 (float64 for float64).

    Args:
        codes: of shape ``[..., d_sae]``.
        W_dec: ``[d_sae, d_in]``, of the dtype of the codes; on the CPU float32 codes also take
            float16 and bfloat16 weights, which are half as much to read.
        b_dec: ``[d_in]``, of the dtype of the codes; default none.

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
        kept = name == "W_dec" and _is_kept_in_16_bits(codes.values, tensor)
        if tensor.dtype != codes.dtype and not kept:
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
    output = dense @ W_dec.to(dense.dtype)
    return output if b_dec is None else output + b_dec


def _dense(values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int) -> Tensor:
    dense = values.new_zeros(row_offsets.shape[0] - 1, d_sae)
    return dense.index_put((_common.rows_of(indices, row_offsets), indices.long()), values)


def _is_kept_in_16_bits(values: Tensor, W_dec: Tensor) -> bool:
    """Whether Rust widens these weights as it reads them."""
    on_cpu = values.device.type == "cpu" and W_dec.device.type == "cpu"
    return on_cpu and values.dtype == torch.float32 and W_dec.dtype in COPY_DTYPES


def _in_rust(values: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> bool:
    if _is_kept_in_16_bits(values, W_dec):
        return _common.in_rust(values, b_dec)
    return _common.in_rust(values, W_dec, b_dec)


def _decode_cpu(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    if not _in_rust(values, W_dec, b_dec):
        return decode_reference(values, indices, row_offsets, W_dec, b_dec)
    output = _core.decode(
        _common.to_rust(values),
        _common.to_rust(indices),
        _common.to_rust(row_offsets),
        _common.to_rust(W_dec),
        None if b_dec is None else _common.to_rust(b_dec),
        _common.threads(values.numel() * W_dec.shape[1]),
    )
    return _common.from_rust(output).reshape(row_offsets.shape[0] - 1, W_dec.shape[1])


def _decode_fake(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    return values.new_empty(row_offsets.shape[0] - 1, W_dec.shape[1])


def _decode_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, row_offsets, W_dec, b_dec = inputs
    ctx.save_for_backward(values, indices, row_offsets, W_dec)
    ctx.has_bias = b_dec is not None


def _decode_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, row_offsets, W_dec = ctx.saved_tensors
    of_values = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_values = _gradient_of_values(gradient, indices, row_offsets, W_dec)
    if ctx.needs_input_grad[3]:
        of_weight = _gradient_of_weight(gradient, values, indices, row_offsets, W_dec.shape[0])
        of_weight = of_weight.to(W_dec.dtype)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        of_bias = gradient.sum(0)
    return of_values, None, None, of_weight, of_bias


_decode = register(
    "decode(Tensor values, Tensor indices, Tensor row_offsets, Tensor W_dec, Tensor? b_dec)"
    " -> Tensor",
    reference=decode_reference,
    cpu=_decode_cpu,
    fake=_decode_fake,
    setup_context=_decode_save,
    backward=_decode_backward,
)


# The two gradients are operations too, each linear in both of its arguments, so that the three
# are one another's gradients and second derivatives come for free.


def _values_reference(
    gradient: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor
) -> Tensor:
    return (gradient @ W_dec.T.to(gradient.dtype))[
        _common.rows_of(indices, row_offsets), indices.long()
    ]


def _values_cpu(gradient: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor) -> Tensor:
    if not _in_rust(gradient, W_dec):
        return _values_reference(gradient, indices, row_offsets, W_dec)
    output = _core.decode_gradient_of_values(
        _common.to_rust(gradient),
        _common.to_rust(indices),
        _common.to_rust(row_offsets),
        _common.to_rust(W_dec),
        _common.threads(),
    )
    return _common.from_rust(output)


def _values_fake(gradient: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor) -> Tensor:
    return gradient.new_empty(indices.shape[0])


def _values_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _values_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    gradient, indices, row_offsets, W_dec = ctx.saved_tensors
    of_gradient = of_weight = None
    if ctx.needs_input_grad[0]:
        of_gradient = _decode(upstream, indices, row_offsets, W_dec, None)
    if ctx.needs_input_grad[3]:
        of_weight = _gradient_of_weight(gradient, upstream, indices, row_offsets, W_dec.shape[0])
        of_weight = of_weight.to(W_dec.dtype)
    return of_gradient, None, None, of_weight


_gradient_of_values = register(
    "decode_gradient_of_values(Tensor gradient, Tensor indices, Tensor row_offsets, Tensor W_dec)"
    " -> Tensor",
    reference=_values_reference,
    cpu=_values_cpu,
    fake=_values_fake,
    setup_context=_values_save,
    backward=_values_backward,
)


def _weight_reference(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> Tensor:
    return _dense(values, indices, row_offsets, d_sae).T @ gradient


def _weight_cpu(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> Tensor:
    if not _common.in_rust(gradient, values):
        return _weight_reference(gradient, values, indices, row_offsets, d_sae)
    output = _core.decode_gradient_of_weight(
        _common.to_rust(gradient),
        _common.to_rust(values),
        _common.to_rust(indices),
        _common.to_rust(row_offsets),
        d_sae,
        _common.threads(),
    )
    return _common.from_rust(output).reshape(d_sae, gradient.shape[1])


def _weight_fake(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> Tensor:
    return gradient.new_empty(d_sae, gradient.shape[1])


def _weight_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _weight_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    gradient, values, indices, row_offsets = ctx.saved_tensors
    of_gradient = of_values = None
    if ctx.needs_input_grad[0]:
        of_gradient = _decode(values, indices, row_offsets, upstream, None)
    if ctx.needs_input_grad[1]:
        of_values = _gradient_of_values(gradient, indices, row_offsets, upstream)
    return of_gradient, of_values, None, None, None


_gradient_of_weight = register(
    "decode_gradient_of_weight(Tensor gradient, Tensor values, Tensor indices, Tensor row_offsets,"
    " SymInt d_sae) -> Tensor",
    reference=_weight_reference,
    cpu=_weight_cpu,
    fake=_weight_fake,
    setup_context=_weight_save,
    backward=_weight_backward,
)
