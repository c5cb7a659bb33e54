"""What the operations share: argument checks, the finite check, the crossing to Rust."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.ops._openmp import release_threads

RawCodes = tuple[Tensor, Tensor, Tensor]
"""values, indices, row_offsets: what a custom operation can return."""

_RUST_DTYPES = (torch.float32, torch.bfloat16)


def in_rust(*tensors: Tensor | None) -> bool:
    """Whether Rust has these: all float32 or all bfloat16 (other dtypes take the reference)."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return len(dtypes) == 1 and dtypes.pop() in _RUST_DTYPES


def to_rust(tensor: Tensor) -> NDArray[Any]:
    """A numpy view (a copy only where not contiguous); bf16 crosses as its bits in uint16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array


def from_rust(array: NDArray[Any]) -> Tensor:
    """The way back, without a copy."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def raw_from_rust(raw: tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64]]) -> RawCodes:
    """The codes that a selection in Rust returned."""
    values, indices, row_offsets = raw
    return from_rust(values), from_rust(indices), from_rust(row_offsets)


def threads(numbers: int = 0) -> int:
    """Rust uses as many threads as torch would; ``numbers``: how many it is about to read."""
    release_threads(numbers)
    return torch.get_num_threads()


def flat_rows(pre_activations: Tensor, k: int | None = None) -> Tensor:
    """Checks the arguments of a selection; ``[..., d_sae]`` becomes ``[rows, d_sae]``."""
    if not isinstance(pre_activations, Tensor):
        found = type(pre_activations).__name__
        raise TypeError(f"pre_activations is a {found}; expected a torch.Tensor")
    if not pre_activations.is_floating_point():
        raise TypeError(f"pre_activations is {pre_activations.dtype}; expected a floating dtype")
    if pre_activations.dim() == 0:
        raise ValueError("pre_activations has no dimensions; expected [..., d_sae]")
    if k is not None:
        check_k(k, pre_activations.shape[-1])
    rows = math.prod(pre_activations.shape[:-1])
    return pre_activations.reshape(rows, pre_activations.shape[-1])


def check_k(k: int, d_sae: int) -> None:
    """``k`` is an int from 0 to ``d_sae``."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r}; expected an int")
    if not 0 <= k <= d_sae:
        raise ValueError(f"k is {k}; expected 0 to {d_sae}, the number of features")


def as_codes(raw: RawCodes, pre_activations: Tensor) -> SparseCodes:
    """Wraps what an operation returned, with the leading shape of its input."""
    leading, d_sae = tuple(pre_activations.shape[:-1]), pre_activations.shape[-1]
    return SparseCodes(*raw, d_sae, leading)


def fake_selection(pre_activations: Tensor, *_: object) -> RawCodes:
    """Every selection's shapes and dtypes; only the run can tell how many codes there are."""
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        pre_activations.new_empty(nnz),
        pre_activations.new_empty(nnz, dtype=torch.int32),
        pre_activations.new_empty(pre_activations.shape[0] + 1, dtype=torch.int64),
    )


def require_finite(pre_activations: Tensor) -> None:
    """Raises NonFiniteError that names the first row that holds a NaN or an infinity."""
    # One number: the cheapest question that a NaN or an infinity can't pass.
    if bool(torch.isfinite(pre_activations).all()):
        return
    row = int((~torch.isfinite(pre_activations).all(-1)).to(torch.uint8).argmax())
    raise not_finite(row)


def not_finite(row: int) -> NonFiniteError:
    """The error for the first row that holds a NaN or an infinity."""
    return NonFiniteError(
        f"pre_activations holds a NaN or infinite value in row {row}; "
        "remove or mask that row before encoding"
    )


def positive_part(pre_activations: Tensor) -> Tensor:
    """relu that takes NaN to 0: what is no number is no code."""
    return torch.where(pre_activations > 0, pre_activations, 0)


def rows_of(indices: Tensor, row_offsets: Tensor) -> Tensor:
    """The row of each code, int64."""
    codes = torch.arange(indices.shape[0], device=indices.device)
    return torch.searchsorted(row_offsets, codes, right=True) - 1


def raw_codes(values: Tensor, rows: Tensor, columns: Tensor, row_count: int) -> RawCodes:
    """Codes in order of rows to CSR."""
    offsets = rows.new_zeros(row_count + 1)
    torch.cumsum(torch.bincount(rows, minlength=row_count), 0, out=offsets[1:])
    return values, columns.to(torch.int32), offsets


def save_selection(ctx: Any, inputs: tuple[Any, ...], output: RawCodes) -> None:
    """Keeps for :func:`selection_backward` where the codes came from."""
    _, indices, row_offsets = output
    ctx.save_for_backward(indices, row_offsets)
    ctx.d_sae = inputs[0].shape[1]


def selection_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of every selection: each code's goes to the value it was."""
    indices, row_offsets = ctx.saved_tensors
    dense = gradient.new_zeros(row_offsets.shape[0] - 1, ctx.d_sae)
    dense = dense.index_put((rows_of(indices, row_offsets), indices.long()), gradient)
    return dense, None, None
