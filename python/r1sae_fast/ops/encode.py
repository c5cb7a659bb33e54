"""Codes straight from x, as one operation: what a GPU does without dense pre-activations.

``select(relu(x @ W_features.T + b_enc))`` for the three ways of selecting. On the CPU these are the
product and then :mod:`ops.topk` and its like (:class:`ops.Screen` is faster there); on CUDA they
are Triton's kernels (see ``ops/_cuda.py``). The gradient is that of the chosen codes alone, so
nothing of size rows x d_sae is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops import _common
from r1sae_fast.ops._common import RawCodes
from r1sae_fast.ops._register import register
from r1sae_fast.ops.batch_topk import _cpu as _select_batch_topk
from r1sae_fast.ops.batch_topk import batch_topk_reference
from r1sae_fast.ops.code_values import codes_backward
from r1sae_fast.ops.threshold import _cpu as _select_threshold
from r1sae_fast.ops.threshold import threshold_reference
from r1sae_fast.ops.topk import _cpu as _select_topk
from r1sae_fast.ops.topk import topk_reference

__all__ = ["encode_batch_topk", "encode_threshold", "encode_topk", "threshold_bounds"]


def encode_topk(
    x: Tensor, W_features: Tensor, b_enc: Tensor, k: int, *, check_finite: bool = True
) -> SparseCodes:
    """The ``k`` largest positive pre-activations of each row, as :func:`ops.topk` has them.

    Args:
        x: ``[..., d_in]``, floating.
        W_features: ``[d_sae, d_in]`` in the dtype of x, the transpose of W_enc.
        b_enc: ``[d_sae]``, likewise.
        k: 0 to d_sae.
        check_finite: refuse rows whose pre-activations hold NaN or infinities.

    Returns:
        ``[..., d_sae]``, differentiable in x, W_features and b_enc.

    Raises:
        TypeError: dtypes that differ, or k not an int.
        ValueError: shapes or devices that don't fit, or k out of range.
        NonFiniteError: names the (flat) row.
    """
    flat = _flat(x, W_features, b_enc)
    _common.check_k(k, W_features.shape[0])
    return _codes(_encode_topk(flat, W_features, b_enc, k, check_finite), x, W_features)


def encode_batch_topk(
    x: Tensor, W_features: Tensor, b_enc: Tensor, k: int, *, check_finite: bool = True
) -> SparseCodes:
    """The ``k * rows`` largest of all rows, as :func:`ops.batch_topk`; see :func:`encode_topk`."""
    flat = _flat(x, W_features, b_enc)
    _common.check_k(k, W_features.shape[0])
    return _codes(_encode_batch_topk(flat, W_features, b_enc, k, check_finite), x, W_features)


def encode_threshold(
    x: Tensor,
    W_features: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    *,
    check_finite: bool = True,
) -> SparseCodes:
    """What exceeds ``threshold`` (a number, ``[]`` or ``[d_sae]``), as :func:`ops.threshold`; see
    :func:`encode_topk`."""
    flat = _flat(x, W_features, b_enc)
    bounds = threshold_bounds(threshold, W_features)
    return _codes(_encode_threshold(flat, W_features, b_enc, bounds, check_finite), x, W_features)


def threshold_bounds(threshold: Tensor | float, W_features: Tensor) -> Tensor:
    """``threshold`` as the operations compare it: ``[1]`` or ``[d_sae]``, float32 (float64 where
    the weights are), on the weights' device.

    Raises:
        ValueError: another shape.
    """
    compared = torch.float64 if W_features.dtype == torch.float64 else torch.float32
    if not isinstance(threshold, Tensor):
        threshold = torch.tensor(threshold, dtype=torch.float64)
    bounds = threshold.detach()
    if tuple(bounds.shape) not in ((), (1,), (W_features.shape[0],)):
        raise ValueError(
            f"threshold has shape {tuple(bounds.shape)}; expected () or ({W_features.shape[0]},)"
        )
    return bounds.to(W_features.device, compared).reshape(-1).contiguous()


def _flat(x: Tensor, W_features: Tensor, b_enc: Tensor) -> Tensor:
    """Checks; ``[..., d_in]`` becomes ``[rows, d_in]``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x is not a floating torch.Tensor")
    if W_features.dim() != 2 or tuple(b_enc.shape) != (W_features.shape[0],):
        raise ValueError(
            f"W_features has shape {tuple(W_features.shape)} and b_enc {tuple(b_enc.shape)}; "
            "expected [d_sae, d_in] and [d_sae]"
        )
    if x.dim() == 0 or x.shape[-1] != W_features.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., {W_features.shape[1]}]")
    for name, tensor in (("W_features", W_features), ("b_enc", b_enc)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} but {name} {tensor.dtype}; cast one of them")
        if tensor.device != x.device:
            raise ValueError(f"x lies on {x.device} but {name} on {tensor.device}; move one")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _codes(raw: RawCodes, x: Tensor, W_features: Tensor) -> SparseCodes:
    return SparseCodes(*raw, W_features.shape[0], tuple(x.shape[:-1]))


def pre_activations(x: Tensor, W_features: Tensor, b_enc: Tensor) -> Tensor:
    """``[rows, d_sae]``, dense, in two steps, each rounded, as the release does."""
    return x @ W_features.T + b_enc


def _of(select: Callable[..., RawCodes]) -> Callable[..., RawCodes]:
    """An encoding that makes the dense pre-activations and selects from them."""

    def encode(
        x: Tensor, W_features: Tensor, b_enc: Tensor, choice: Any, check_finite: bool
    ) -> RawCodes:
        return select(pre_activations(x, W_features, b_enc), choice, check_finite)

    return encode


encode_topk_reference = _of(topk_reference)
"""The truth, in plain torch; likewise the next two."""
encode_batch_topk_reference = _of(batch_topk_reference)
encode_threshold_reference = _of(threshold_reference)


def save_encoding(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps for :func:`encoding_backward` what the codes came from; nothing dense."""
    ctx.save_for_backward(output[1], output[2], inputs[0], inputs[1])
    ctx.inputs = len(inputs)


def encoding_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of every operation that opens with x, W_features, b_enc and returns codes."""
    found = codes_backward(gradient, ctx.saved_tensors, ctx.needs_input_grad[:3])
    return (*found, *(None for _ in range(ctx.inputs - 3)))


_ARGUMENTS = "Tensor x, Tensor W_features, Tensor b_enc"
_RESULT = "(Tensor, Tensor, Tensor)"

_encode_topk = register(
    f"encode_topk({_ARGUMENTS}, int k, bool check_finite) -> {_RESULT}",
    reference=encode_topk_reference,
    cpu=_of(_select_topk),
    fake=_common.fake_selection,
    setup_context=save_encoding,
    backward=encoding_backward,
)
_encode_batch_topk = register(
    f"encode_batch_topk({_ARGUMENTS}, int k, bool check_finite) -> {_RESULT}",
    reference=encode_batch_topk_reference,
    cpu=_of(_select_batch_topk),
    fake=_common.fake_selection,
    setup_context=save_encoding,
    backward=encoding_backward,
)
_encode_threshold = register(
    f"encode_threshold({_ARGUMENTS}, Tensor threshold, bool check_finite) -> {_RESULT}",
    reference=encode_threshold_reference,
    cpu=_of(_select_threshold),
    fake=_common.fake_selection,
    setup_context=save_encoding,
    backward=encoding_backward,
)
