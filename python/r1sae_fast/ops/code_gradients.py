"""Sums over each feature's codes: what the gradients of encoder, decoder and b_enc are.

Deterministic on every device: a feature's codes are added up in order of rows, without atomics.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from r1sae_fast.ops._register import register
from r1sae_fast.ops.decode import (
    _decode,
    _gradient_of_values,
    _weight_cpu,
    _weight_reference,
)

__all__ = ["code_gradients", "sums_by_feature"]


def sums_by_feature(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    """For each feature, the sum over its codes of ``value * gradient[row]``, and of ``value``.

    Args:
        gradient: ``[rows, d_in]``.
        values, indices, row_offsets: codes of ``rows`` rows; values in the dtype of ``gradient``.
        d_sae: number of features.

    Returns:
        ``([d_sae, d_in], [d_sae])``; 0 where a feature has no codes.
    """
    found: tuple[Tensor, Tensor] = _sums_by_feature(gradient, values, indices, row_offsets, d_sae)
    return found


def code_gradients(
    x: Tensor,
    of_values: Tensor,
    gradient: Tensor,
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    d_sae: int,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of encoder, decoder and b_enc of an SAE at once (one sort of the codes).

    Args:
        x: ``[rows, d_in]``, what was encoded.
        of_values: ``[nnz]``, the gradient of the codes' values.
        gradient: ``[rows, d_in]``, of the reconstruction.
        values, indices, row_offsets: the codes.
        d_sae: number of features.
        features: int64 ``[n]``, each at most once: only theirs. Default all.

    Returns:
        ``(encoder [n or d_sae, d_in], decoder [n or d_sae, d_in], b_enc [n or d_sae])``.
    """
    found: tuple[Tensor, Tensor, Tensor] = _code_gradients(
        x, of_values, gradient, values, indices, row_offsets, d_sae, features
    )
    return found


def _sums(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    return values.new_zeros(d_sae).index_add(0, indices, values)


def _sums_reference(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    matrix = _weight_reference(gradient, values, indices, row_offsets, d_sae)
    return matrix, _sums(values, indices, d_sae)


def _sums_cpu(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    matrix = _weight_cpu(gradient, values, indices, row_offsets, d_sae)
    return matrix, _sums(values, indices, d_sae)


def _sums_fake(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(d_sae, gradient.shape[1]), values.new_empty(d_sae)


def _sums_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _sums_backward(ctx: Any, of_matrix: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
    gradient, values, indices, row_offsets = ctx.saved_tensors
    of_gradient = of_values = None
    if ctx.needs_input_grad[0]:
        of_gradient = _decode(values, indices, row_offsets, of_matrix, None)
    if ctx.needs_input_grad[1]:
        of_values = _gradient_of_values(gradient, indices, row_offsets, of_matrix)
        of_values = of_values + of_sums[indices.long()]
    return of_gradient, of_values, None, None, None


_sums_by_feature = register(
    "sums_by_feature(Tensor gradient, Tensor values, Tensor indices, Tensor row_offsets,"
    " SymInt d_sae) -> (Tensor, Tensor)",
    reference=_sums_reference,
    cpu=_sums_cpu,
    fake=_sums_fake,
    setup_context=_sums_save,
    backward=_sums_backward,
)


def _pair(way: Any) -> Any:
    def both(
        x: Tensor,
        of_values: Tensor,
        gradient: Tensor,
        values: Tensor,
        indices: Tensor,
        row_offsets: Tensor,
        d_sae: int,
        features: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        encoder = way(x, of_values, indices, row_offsets, d_sae)
        decoder = way(gradient, values, indices, row_offsets, d_sae)
        b_enc = _sums(of_values, indices, d_sae)
        if features is None:
            return encoder, decoder, b_enc
        return encoder[features], decoder[features], b_enc[features]

    return both


def _pair_fake(
    x: Tensor,
    of_values: Tensor,
    gradient: Tensor,
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    d_sae: int,
    features: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    count = d_sae if features is None else features.shape[0]
    return (
        x.new_empty(count, x.shape[1]),
        gradient.new_empty(count, gradient.shape[1]),
        of_values.new_empty(count),
    )


def _pair_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], inputs[7])
    ctx.d_sae = inputs[6]


def _pair_backward(
    ctx: Any, of_encoder: Tensor, of_decoder: Tensor, of_bias: Tensor
) -> tuple[Tensor | None, ...]:
    x, of_values, gradient, values, indices, row_offsets, features = ctx.saved_tensors
    if features is not None:

        def spread(part: Tensor) -> Tensor:
            whole = part.new_zeros(ctx.d_sae, *part.shape[1:])
            return whole.index_copy(0, features, part)

        of_encoder, of_decoder, of_bias = map(spread, (of_encoder, of_decoder, of_bias))
    to_x = _decode(of_values, indices, row_offsets, of_encoder, None)
    to_of_values = _gradient_of_values(x, indices, row_offsets, of_encoder)
    to_of_values = to_of_values + of_bias[indices.long()]
    to_gradient = _decode(values, indices, row_offsets, of_decoder, None)
    to_values = _gradient_of_values(gradient, indices, row_offsets, of_decoder)
    return to_x, to_of_values, to_gradient, to_values, None, None, None, None


_pair_reference = _pair(_weight_reference)
_code_gradients = register(
    "code_gradients(Tensor x, Tensor of_values, Tensor gradient, Tensor values, Tensor indices,"
    " Tensor row_offsets, SymInt d_sae, Tensor? features) -> (Tensor, Tensor, Tensor)",
    reference=_pair_reference,
    cpu=_pair(_weight_cpu),
    fake=_pair_fake,
    setup_context=_pair_save,
    backward=_pair_backward,
)
