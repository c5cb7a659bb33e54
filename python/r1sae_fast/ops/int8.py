"""Screening by 8-bit products as operations: what :class:`ops.Screen` runs on a GPU.

Their reference computes every pre-activation in float64 and rounds it once; the kernels bound all
of them first (``triton_kernels/int8_screen.py``) and compute few. The codes are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1sae_fast.ops import _common
from r1sae_fast.ops._common import RawCodes
from r1sae_fast.ops._register import register
from r1sae_fast.ops.batch_topk import batch_topk_reference
from r1sae_fast.ops.encode import encoding_backward, save_encoding
from r1sae_fast.ops.threshold import threshold_reference
from r1sae_fast.ops.topk import topk_reference

__all__ = ["encode", "encode_reference", "weights", "weights_reference"]


def weights_reference(W_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 rows, their scales and lengths; to nearest, where the kernel rounds at random."""
    largest = W_features.abs().amax(1)
    scales = torch.where(largest > 1e-30, largest / 127, 0)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    quantised = (W_features * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    return quantised, scales, W_features.norm(dim=1)


def encode_reference(
    x: Tensor,
    W_features: Tensor,
    b_enc: Tensor,
    quantised: Tensor,
    scales: Tensor,
    norms: Tensor,
    rule: str,
    k: int,
    threshold: Tensor,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The truth: all pre-activations in float64, rounded, the bias added."""
    pre = (x.double() @ W_features.double().T).to(x.dtype) + b_enc
    codes: RawCodes
    if rule == "topk":
        codes = topk_reference(pre, k, check_finite)
    elif rule == "batch_topk":
        codes = batch_topk_reference(pre, k, check_finite)
    else:
        codes = threshold_reference(pre, threshold, check_finite)
    counts = torch.tensor([pre.numel(), pre.shape[0], 0], device=x.device)
    return (*codes, counts)


def _weights_fake(W_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = W_features.shape[0]
    return (
        torch.empty_like(W_features, dtype=torch.int8, memory_format=torch.contiguous_format),
        W_features.new_empty(rows),
        W_features.new_empty(rows),
    )


def _encode_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_common.fake_selection(x), x.new_empty(3, dtype=torch.int64))


def _nothing(ctx: Any, *_: Any) -> None:
    return None


weights = register(
    "int8_weights(Tensor W_features) -> (Tensor, Tensor, Tensor)",
    reference=weights_reference,
    cpu=weights_reference,
    fake=_weights_fake,
    # Rounding passes no gradient; the codes' gradient is that of the exact weights.
    setup_context=_nothing,
    backward=_nothing,
)
encode = register(
    "int8_encode(Tensor x, Tensor W_features, Tensor b_enc, Tensor quantised, Tensor scales,"
    " Tensor norms, str rule, int k, Tensor threshold, bool check_finite)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=encode_reference,
    cpu=encode_reference,
    fake=_encode_fake,
    setup_context=save_encoding,
    backward=encoding_backward,
)
