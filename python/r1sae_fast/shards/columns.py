"""The four columns that say where each row comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROMPT, THINKING, RESPONSE, UNKNOWN = 0, 1, 2, 255
"""Values of ``segment``: the part of a reasoning model's text that a token belongs to."""

IntColumn = Tensor | np.ndarray[Any, Any] | Sequence[int] | int | None
"""What writers take for a column: an integer for each row, one for all rows, or nothing."""

COLUMNS: dict[str, tuple[torch.dtype, str, int]] = {
    # name: (dtype, its safetensors name, what stands for "unknown"), in file order
    "tokens": (torch.int32, "I32", -1),
    "sequence_id": (torch.int64, "I64", -1),
    "position": (torch.int32, "I32", -1),
    "segment": (torch.uint8, "U8", UNKNOWN),
}

# torch can neither compare these nor find their extremes; numpy can.
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}


def to_column(name: str, value: IntColumn, rows: int) -> Tensor:
    """``value`` as the column ``name`` of ``rows`` rows, checked.

    Raises:
        TypeError: not integers.
        ValueError: another length than ``rows``, or a number that the column can't hold.
    """
    dtype, _, unknown = COLUMNS[name]
    if value is None:
        return torch.full((rows,), unknown, dtype=dtype)
    column = _to_tensor(name, value)
    if column.dtype.is_floating_point or column.dtype.is_complex or column.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {column.dtype}; expected integers")
    if column.ndim == 0:
        column = column.expand(rows)
    if tuple(column.shape) != (rows,):
        raise ValueError(
            f"{name} has shape {tuple(column.shape)}; expected ({rows},), one for each row"
        )
    limits = torch.iinfo(dtype)
    if rows and column.dtype != dtype:
        low, high = int(column.min()), int(column.max())
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"{name} goes from {low} to {high}; expected {limits.min} to {limits.max}"
            )
    return column.to(dtype)


def _to_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype not in _UNSIGNED:
            return value.detach().cpu()
        value = value.cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{name} is not an array of integers: {error}") from None
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)  # an empty list says nothing of its type
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; expected integers")
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {int(array.max())}, more than a 64-bit integer")
    return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))


def empty_columns(rows: int) -> dict[str, Tensor]:
    """Columns of ``rows`` rows to be filled."""
    return {name: torch.empty(rows, dtype=dtype) for name, (dtype, _, _) in COLUMNS.items()}
