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
