"""Turns what stands between the brackets of ``shards[...]`` into rows."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = tuple[int, int] | np.ndarray[Any, np.dtype[np.int64]]
"""Consecutive rows ``(start, stop)``, or any rows, each from 0 to the length."""


def to_rows(key: Any, length: int) -> Rows:
    """Rows of ``length`` that ``key`` (int, slice, integer or boolean array) means.

    Raises:
        IndexError: a row out of range, or a boolean array of another length.
        TypeError: anything else.
    """
    if isinstance(key, slice):
        start, stop, step = key.indices(length)
        if step == 1:
            return start, max(start, stop)
        return np.arange(start, stop, step, dtype=np.int64)
    if isinstance(key, Tensor):
        key = key.detach().cpu().numpy()
    if not isinstance(key, (list, tuple, np.ndarray)) or np.ndim(key) == 0:
        return _one_row(key, length)
    rows = np.asarray(key)
    if rows.size == 0 and not isinstance(key, np.ndarray):
        rows = rows.astype(np.int64)  # an empty list says nothing of its type
    if rows.ndim != 1:
        raise TypeError(f"rows are given by an array of shape {rows.shape}; expected one dimension")
    if rows.dtype == np.bool_:
        if rows.shape[0] != length:
            raise IndexError(f"a boolean array of {rows.shape[0]} elements for {length} rows")
        return np.flatnonzero(rows).astype(np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(
            f"rows are given by an array of {rows.dtype}; expected integers or booleans"
        )
    outside = (rows < -length) | (rows >= length) if rows.dtype.kind == "i" else rows >= length
    if outside.any():
        raise IndexError(f"row {int(rows[outside][0])} is out of range for {length} rows")
    wide = rows.astype(np.int64)
    return np.ascontiguousarray(np.where(wide < 0, wide + length, wide))


def _one_row(key: Any, length: int) -> tuple[int, int]:
    try:
        row = operator.index(key.item() if isinstance(key, np.ndarray) else key)
    except TypeError:
        raise TypeError(
            f"rows are given by {type(key).__name__}; expected an int, a slice or an array of ints"
        ) from None
    if not -length <= row < length:
        raise IndexError(f"row {row} is out of range for {length} rows")
    row %= length
    return row, row + 1


def count(rows: Rows) -> int:
    """How many rows."""
    return rows[1] - rows[0] if isinstance(rows, tuple) else rows.shape[0]


def as_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a contiguous CPU tensor, shared, as a flat array."""
    array: np.ndarray[Any, np.dtype[np.uint8]] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array
