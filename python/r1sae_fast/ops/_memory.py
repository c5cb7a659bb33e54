"""Weights on large pages: they are read here and there, and looking an address up costs time."""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.ops import _common

__all__ = ["empty_weights", "on_large_pages"]

# Below this the system's own caches of addresses do.
_LARGE_BYTES = 32 << 20


def empty_weights(
    *shape: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """``torch.empty``, on large pages where the tensor is large and the system has them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if (
        tensor.device.type == "cpu"
        and tensor.nbytes >= _LARGE_BYTES
        and _common.in_rust(tensor)
        and not torch.compiler.is_compiling()
    ):
        _core.prefer_large_pages(_common.to_rust(tensor.reshape(-1)))
    return tensor


def on_large_pages(tensor: Tensor) -> Tensor:
    """A copy by :func:`empty_weights` of a large tensor; a small one as it is."""
    if tensor.device.type != "cpu" or tensor.nbytes < _LARGE_BYTES or not _common.in_rust(tensor):
        return tensor
    copy = empty_weights(*tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)
