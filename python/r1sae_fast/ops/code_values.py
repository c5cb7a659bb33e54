"""The gradient of codes that were found without dense pre-activations.

A value is ``<x[row], W_enc[:, feature]> + b_enc[feature]``: its gradient concerns that row of x,
that column of W_enc and that bias alone, so nothing of size rows x d_sae is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops._register import register
from r1sae_fast.ops.code_gradients import _sums_by_feature
from r1sae_fast.ops.decode import _decode

__all__ = ["codes_backward", "with_gradient"]


def with_gradient(codes: SparseCodes, x: Tensor, W_features: Tensor, b_enc: Tensor) -> SparseCodes:
    """``codes`` as a function of what they were computed from.

    Args:
        codes: of ``x @ W_features.T + b_enc``; their values are taken as they are.
        x: ``[..., d_in]``, of the leading shape of the codes.
        W_features: ``[d_sae, d_in]``, the transpose of W_enc.
        b_enc: ``[d_sae]``.

    Returns:
        The same codes, differentiable in x, W_features and b_enc.
    """
    if not (
        torch.is_grad_enabled()
        and (x.requires_grad or W_features.requires_grad or b_enc.requires_grad)
    ):
        return codes
    flat = x.reshape(codes.rows, x.shape[-1])
    values = _code_values(codes.values, codes.indices, codes.row_offsets, flat, W_features, b_enc)
    return replace(codes, values=values)


def _forward(
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    x: Tensor,
    W_features: Tensor,
    b_enc: Tensor,
) -> Tensor:
    # An operation may not return its own input.
    return values.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[3:]
    return None, None, None, *codes_backward(gradient, ctx.saved_tensors, needed)


def codes_backward(
    gradient: Tensor, saved: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_features and b_enc, as far as ``needed``, from that of the values;
    ``saved`` are indices, row_offsets, x and W_features."""
    indices, row_offsets, x, W_features = saved
    of_x = of_weight = of_bias = None
    if needed[0]:
        of_x = _decode(gradient, indices, row_offsets, W_features, None)
    if needed[1]:
        of_weight, of_bias = _sums_by_feature(
            x, gradient, indices, row_offsets, W_features.shape[0]
        )
    elif needed[2]:
        # In bfloat16 a sum would stall at 256 times an addend.
        wide = torch.promote_types(gradient.dtype, torch.float32)
        of_bias = gradient.new_zeros(W_features.shape[0], dtype=wide)
        of_bias = of_bias.index_add_(0, indices, gradient.to(wide)).to(gradient.dtype)
    return of_x, of_weight, of_bias if needed[2] else None


_code_values = register(
    "code_values(Tensor values, Tensor indices, Tensor row_offsets, Tensor x, Tensor W_features,"
    " Tensor b_enc) -> Tensor",
    reference=_forward,
    cpu=_forward,
    fake=lambda values, *_: torch.empty_like(values),
    setup_context=_save,
    backward=_backward,
)
