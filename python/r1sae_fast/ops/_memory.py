"""Weights on large pages: they are read here and there, and looking an address up costs time.
Zeros on small ones, which take no memory until they are written to."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.ops import _common

__all__ = ["copy_on_demand", "empty_weights", "on_large_pages", "zeros_on_demand"]

# Below this the system's own caches of addresses do.
_LARGE_BYTES = 32 << 20
_COPIED_ROWS = 1024


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


def zeros_on_demand(like: Tensor) -> Tensor:
    """``torch.zeros_like`` (strides kept), which takes memory only as far as it is written to, by
    pages of some KiB, where ``like`` is large, on the CPU and dense, and the system maps memory
    without a file."""
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    lies_in_order = like.is_contiguous() or (like.dim() == 2 and like.T.is_contiguous())
    if like.device.type != "cpu" or like.nbytes < _LARGE_BYTES or not (flags and lies_in_order):
        return torch.zeros_like(like, memory_format=torch.preserve_format)
    pages = mmap.mmap(-1, like.nbytes, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # With a large page comes its neighbourhood. Kernels without large pages refuse.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    flat = torch.frombuffer(pages, dtype=like.dtype)
    return flat.view(like.shape) if like.is_contiguous() else flat.view(like.T.shape).T


def copy_on_demand(tensor: Tensor) -> Tensor:
    """A copy, in which rows of zeros take no memory where that matters."""
    copy = zeros_on_demand(tensor)
    if tensor.dim() != 2:
        return copy.copy_(tensor)
    for start in range(0, tensor.shape[0], _COPIED_ROWS):
        part = tensor[start : start + _COPIED_ROWS]
        # By bits: a zero may have a sign.
        touched = part.view(torch.uint8).any(dim=1).bool()
        copy[start : start + _COPIED_ROWS][touched] = part[touched]
    return copy
