"""How many rows products are done with.

On CPUs torch compiles a bf16 product anew for every number of rows: one to four milliseconds, in
which a small model's product runs ten times, and half a megabyte that stays, for a thousand such
products. Batches and experts get as many rows as chance will have it; so they are filled up to one
of few sizes.
"""

from __future__ import annotations

import torch

_STEPS = 8  # sizes an octave: at most an eighth is added
_SMALLEST_STEP = 16


def compiled_by_shape(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products are compiled for each number of rows."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def size_of(rows: int) -> int:
    """The size that ``rows`` are filled up to: powers of two up to 16, then eight an octave, but
    none closer than 16."""
    if rows <= 1:
        return rows
    power = 1 << (rows - 1).bit_length()
    if power <= _SMALLEST_STEP:
        return power
    step = max(power // 2 // _STEPS, _SMALLEST_STEP)
    return -(-rows // step) * step


def padded(rows: int, dtype: torch.dtype, device: torch.device, most: int | None = None) -> int:
    """``rows`` filled up (to no more than ``most``) where products are compiled by shape."""
    if not compiled_by_shape(dtype, device):
        return rows
    return size_of(rows) if most is None else max(min(size_of(rows), most), rows)
