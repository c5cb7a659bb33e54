"""The operations on a GPU: Triton kernels where they take the dtype, else the reference.

CUDA is also what torch calls AMD's GPUs. Triton is imported at the first call, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1sae_fast.ops.decode import _values_reference, _weight_reference, decode_reference

__all__ = ["decode", "gradient_of_values", "gradient_of_weight"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Library: Any = torch.library.Library  # torch's class has no types
_LIBRARY = _Library("r1sae_fast", "IMPL")


def _in_triton(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: one dtype, one they know, and triton is installed."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) != 1 or dtypes.pop() not in _DTYPES:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def decode(
    values: Tensor, indices: Tensor, row_offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """``torch.ops.r1sae_fast.decode``."""
    if not _in_triton(values, W_dec, b_dec):
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
    if not _in_triton(gradient, W_dec):
        return _values_reference(gradient, indices, row_offsets, W_dec)
    from r1sae_fast.triton_kernels import sparse_grad as kernels

    return kernels.gradient_of_values(
        gradient.contiguous(), indices.contiguous(), row_offsets.contiguous(), W_dec.contiguous()
    )


def gradient_of_weight(
    gradient: Tensor, values: Tensor, indices: Tensor, row_offsets: Tensor, d_sae: int
) -> Tensor:
    """``torch.ops.r1sae_fast.decode_gradient_of_weight``."""
    if not _in_triton(gradient, values):
        return _weight_reference(gradient, values, indices, row_offsets, d_sae)
    from r1sae_fast.triton_kernels import sparse_grad as kernels

    by_feature = kernels.feature_major(indices.contiguous(), row_offsets.contiguous(), d_sae)
    return kernels.gradient_of_weight(gradient.contiguous(), values.contiguous(), by_feature)[0]


for _name, _function in (
    ("decode", decode),
    ("decode_gradient_of_values", gradient_of_values),
    ("decode_gradient_of_weight", gradient_of_weight),
):
    _LIBRARY.impl(_name, _function, "CUDA")
