"""Gradient clipping without writing factored gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from r1sae_fast.optim.factored import (
    FactoredGradient,
    as_rows,
    factored_gradient,
    feature_major,
    turning,
)

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    unit_rows: Iterable[Tensor] = (),
    total: Callable[[float], float] = float,
    shared: Iterable[Tensor] = (),
) -> float | None:
    """Scales all gradients, factored and dense, so that their common norm is at most ``max_norm``.

    Where a cheap bound of the norm is within ``max_norm`` already, the norm isn't computed.

    Args:
        parameters: those whose gradients count.
        max_norm: more than 0.
        unit_rows: parameters of rows of norm 1, of whose gradients only what turns them counts
            (as with :class:`Adam`'s ``unit_rows``).
        total: where parameters are split among processes: the sum over these of a number. All of
            them clip at the same time, by the norm of all gradients.
        shared: those of the parameters that are not split, but the same, with the same dense
            gradient, in every process.

    Returns:
        The norm before; None where only its bound was needed.

    Raises:
        ValueError: ``max_norm`` is not above 0.
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm is {max_norm}; expected more than 0")
    parameters = list(parameters)
    turned = {id(parameter) for parameter in unit_rows}
    whole = {id(parameter) for parameter in shared}
    dense, factored, counted_together, squared, of_shared = [], [], [], 0.0, 0.0
    for parameter in parameters:
        gradient = factored_gradient(parameter)
        if parameter.grad is not None:
            dense.append(parameter.grad)
        if gradient is not None and parameter.grad is not None:
            # Their sum has a norm of its own.
            both = FactoredGradient(gradient.d_sae, gradient.d_in)
            both.extend(gradient)
            both.add_dense(as_rows(parameter.grad, parameter))
            counted_together.append((both, parameter))
        elif parameter.grad is not None:
            turns = id(parameter) in turned
            counted = turning(parameter.grad, parameter) if turns else parameter.grad
            if id(parameter) in whole:
                of_shared += float(counted.norm()) ** 2
            else:
                squared += float(counted.norm()) ** 2
        elif gradient is not None:
            counted_together.append((gradient, parameter))
        if gradient is not None:
            factored.append(gradient)
    bound = squared + sum(gradient.norm_bound() ** 2 for gradient, _ in counted_together)
    bound = total(bound) + of_shared
    # False for NaN, which then shows itself in the norm.
    if bound <= max_norm**2:
        return None
    for gradient, parameter in counted_together:
        weight = feature_major(parameter)
        if weight is None:
            raise ValueError("a factored gradient for a parameter that is not a contiguous matrix")
        squared += gradient.norm(weight, unit_rows=id(parameter) in turned) ** 2
    norm = float((total(squared) + of_shared) ** 0.5)
    if not norm <= max_norm:
        factor = max_norm / norm
        for gradient in factored:
            gradient.scale_(factor)
        for tensor in dense:
            tensor.mul_(factor)
    return norm
