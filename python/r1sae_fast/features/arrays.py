"""Arrow arrays of NumPy's values and of texts.

``pyarrow.array`` would do, but its first call imports pandas where that is installed, which takes
longer than building a small database.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def array(values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> pa.Array:
    """Shares the memory of ``values`` (numbers, one axis). NULL: where not ``valid``, and NaN."""
    values = np.ascontiguousarray(values)
    if values.dtype.kind == "f":
        nan = np.isnan(values)
        if nan.any():
            valid = ~nan if valid is None else valid & ~nan
    buffers = [_bits(valid), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)


def strings(values: Iterable[str | None]) -> pa.Array:
    """Strings; None is NULL."""
    builder = pa.lib.StringBuilder()
    builder.append_values(values)
    return builder.finish()


def lists(values: NDArray[Any], rows: int) -> pa.Array:
    """``[rows * n]`` as lists of n."""
    size = len(values) // max(rows, 1)
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(size)
    return pa.ListArray.from_arrays(array(offsets), array(values))


def _bits(valid: NDArray[np.bool_] | None) -> pa.Buffer | None:
    return None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))


def numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """The values of a column of numbers without NULL; shares its memory where it is of one piece.

    (``to_numpy`` imports pandas too.)
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # older versions' of none
            column = pa.concat_arrays(column.chunks)
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} values are NULL; expected none")
    kind = np.dtype(column.type.to_pandas_dtype())
    data = column.buffers()[1]
    if data is None or not len(column):
        return np.empty(0, dtype=kind)
    return np.frombuffer(data, dtype=kind, count=len(column), offset=column.offset * kind.itemsize)
