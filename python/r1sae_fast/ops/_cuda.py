"""The operations on a GPU: Triton kernels where they take the dtype, else the reference.

CUDA is also what torch calls AMD's GPUs. Triton is imported at the first call, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1sae_fast.ops import _common, int8
from r1sae_fast.ops._common import RawCodes
from r1sae_fast.ops._device import in_triton
from r1sae_fast.ops.code_gradients import _pair_reference, _sums_reference
from r1sae_fast.ops.decode import _values_reference, _weight_reference, decode_reference
from r1sae_fast.ops.encode import (
    encode_batch_topk_reference,
    encode_threshold_reference,
    encode_topk_reference,
)
from r1sae_fast.ops.tap import tap_reference

_Library: Any = torch.library.Library  # torch's class has no types
_LIBRARY = _Library("r1sae_fast", "IMPL")


def encode_topk(
    x: Tensor, W_features: Tensor, b_enc: Tensor, k: int, check_finite: bool
) -> RawCodes:
    """``torch.ops.r1sae_fast.encode_topk``."""
    if not in_triton(x, W_features, b_enc):
        return encode_topk_reference(x, W_features, b_enc, k, check_finite)
    from r1sae_fast.triton_kernels.encode_topk import MOST_K
    from r1sae_fast.triton_kernels.encode_topk import encode_topk as kernels
    from r1sae_fast.triton_kernels.encode_topk_large import encode_topk_large

    given = (x.contiguous(), W_features.T, b_enc.contiguous(), k)
    if k > MOST_K:
        return _checked(*encode_topk_large(*given, check_finite=check_finite), x, check_finite)
    padded = kernels(*given, check_finite=check_finite)
    return _checked(padded.compact(), padded.bad_row, x, check_finite)


def encode_batch_topk(
    x: Tensor, W_features: Tensor, b_enc: Tensor, k: int, check_finite: bool
) -> RawCodes:
    """``torch.ops.r1sae_fast.encode_batch_topk``."""
    if not in_triton(x, W_features, b_enc):
        return encode_batch_topk_reference(x, W_features, b_enc, k, check_finite)
    from r1sae_fast.triton_kernels.encode_batch_topk import encode_batch_topk as kernels

    given = (x.contiguous(), W_features.T, b_enc.contiguous(), k)
    return _checked(*kernels(*given, check_finite=check_finite), x, check_finite)


def encode_threshold(
    x: Tensor, W_features: Tensor, b_enc: Tensor, threshold: Tensor, check_finite: bool
) -> RawCodes:
    """``torch.ops.r1sae_fast.encode_threshold``."""
    if not in_triton(x, W_features, b_enc):
        return encode_threshold_reference(x, W_features, b_enc, threshold, check_finite)
    from r1sae_fast.triton_kernels.encode_threshold import encode_threshold as kernels

    given = (x.contiguous(), W_features.T, b_enc.contiguous(), threshold)
    return _checked(*kernels(*given, check_finite=check_finite), x, check_finite)


def _checked(codes: RawCodes, bad_row: Tensor, x: Tensor, check_finite: bool) -> RawCodes:
    """Raises NonFiniteError where the kernels saw a NaN or an infinity."""
    if check_finite and (row := int(bad_row)) < x.shape[0]:
        raise _common.not_finite(row)
    return codes


def int8_weights(W_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.r1sae_fast.int8_weights``."""
    if not in_triton(W_features):
        return int8.weights_reference(W_features)
    from r1sae_fast.triton_kernels.int8_screen import screened_weights

    made = screened_weights(W_features)
    return made.quantised, made.scales, made.norms


def int8_encode(
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
    """``torch.ops.r1sae_fast.int8_encode``."""
    if not in_triton(x, W_features, b_enc) or x.dtype != torch.float32:
        given = (x, W_features, b_enc, quantised, scales, norms, rule, k, threshold, check_finite)
        return int8.encode_reference(*given)
    from r1sae_fast.triton_kernels import int8_encode as kernels
    from r1sae_fast.triton_kernels.int8_screen import ScreenedWeights

    if check_finite:
        bad = ~x.isfinite().all(1)
        if bool(bad.any()):
            raise _common.not_finite(int(bad.to(torch.uint8).argmax()))
    weights = ScreenedWeights(W_features.contiguous(), b_enc.contiguous(), quantised, scales, norms)
    if rule == "topk":
        found = kernels.int8_topk(x, weights, k)
    elif rule == "batch_topk":
        found = kernels.int8_batch_topk(x, weights, k)
    else:
        found = kernels.int8_threshold(x, weights, threshold)
    values, indices, offsets = found.codes
    if check_finite and not bool(values.isfinite().all()):
        place = values.isfinite().logical_not_().to(torch.uint8).argmax()
        raise _common.not_finite(int(torch.searchsorted(offsets, place, right=True)) - 1)
    counts = [found.candidates, found.exact_rows, found.violations]
    return values, indices, offsets, torch.tensor(counts, device=x.device)


def decode(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """``torch.ops.r1sae_fast.decode``."""
    if not in_triton(values, W_dec, b_dec):
        return decode_reference(values, indices, row_offsets, W_dec, b_dec)
    from r1sae_fast.triton_kernels import decode as kernels

    return kernels.decode(
        values.contiguous(),
        indices.contiguous(),
        row_offsets.contiguous(),
        W_dec.contiguous(),
        None if b_dec is None else b_dec.contiguous(),
    )


def gradient_of_values(
    gradient: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor
) -> Tensor:
    """``torch.ops.r1sae_fast.decode_gradient_of_values``."""
    if not in_triton(gradient, W_dec):
        return _values_reference(gradient, indices, row_offsets, W_dec)
    from r1sae_fast.triton_kernels import sparse_grad as kernels

    return kernels.gradient_of_values(
        gradient.contiguous(), indices.contiguous(), row_offsets.contiguous(), W_dec.contiguous()
    )


def gradient_of_weight(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> Tensor:
    """``torch.ops.r1sae_fast.decode_gradient_of_weight``."""
    if not in_triton(gradient, values):
        return _weight_reference(gradient, values, indices, row_offsets, d_sae)
    from r1sae_fast.triton_kernels import sparse_grad as kernels

    by_feature = kernels.feature_major(indices.contiguous(), row_offsets.contiguous(), d_sae)
    return kernels.gradient_of_weight(gradient.contiguous(), values.contiguous(), by_feature)[0]


def sums_by_feature(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    """``torch.ops.r1sae_fast.sums_by_feature``."""
    if not in_triton(gradient, values):
        return _sums_reference(gradient, values, indices, row_offsets, d_sae)
    from r1sae_fast.triton_kernels import sparse_grad as kernels

    by_feature = kernels.feature_major(indices.contiguous(), row_offsets.contiguous(), d_sae)
    given = (gradient.contiguous(), values.contiguous(), by_feature)
    matrix, sums = kernels.gradient_of_weight(*given, with_sums=True)
    assert sums is not None
    return matrix, sums


def code_gradients(
    x: Tensor,
    of_values: Tensor,
    gradient: Tensor,
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    d_sae: int,
    features: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.r1sae_fast.code_gradients``."""
    if not in_triton(x, of_values, gradient, values):
        given = (x, of_values, gradient, values, indices, row_offsets, d_sae, features)
        plain: tuple[Tensor, Tensor, Tensor] = _pair_reference(*given)
        return plain
    from r1sae_fast.triton_kernels import sparse_grad as kernels

    by_feature = kernels.feature_major(indices.contiguous(), row_offsets.contiguous(), d_sae)
    encoder, b_enc = kernels.gradient_of_weight(
        x.contiguous(), of_values.contiguous(), by_feature, features=features, with_sums=True
    )
    decoder, _ = kernels.gradient_of_weight(
        gradient.contiguous(), values.contiguous(), by_feature, features=features
    )
    assert b_enc is not None
    return encoder, decoder, b_enc


def sae_tap(residual: Tensor, W_enc: Tensor, *rest: Any) -> None:
    """``torch.ops.r1sae_fast.sae_tap``."""
    if not in_triton(residual, W_enc):
        tap_reference(residual, W_enc, *rest)
        return
    from r1sae_fast.triton_kernels.sae_tap import run_tap

    run_tap(residual, W_enc, *rest)


KERNELS = {
    "encode_topk": encode_topk,
    "encode_batch_topk": encode_batch_topk,
    "encode_threshold": encode_threshold,
    "int8_weights": int8_weights,
    "int8_encode": int8_encode,
    "decode": decode,
    "decode_gradient_of_values": gradient_of_values,
    "decode_gradient_of_weight": gradient_of_weight,
    "sums_by_feature": sums_by_feature,
    "code_gradients": code_gradients,
    "sae_tap": sae_tap,
}
"""By operation."""

for _name, _function in KERNELS.items():
    _LIBRARY.impl(_name, _function, "CUDA")
