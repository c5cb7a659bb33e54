"""Which tensors lie where there are kernels for them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DTYPES", "has_triton", "in_triton", "on_gpu"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels take."""


def on_gpu(tensor: Tensor) -> bool:
    """Whether the operations on this tensor are those of ``ops/_cuda.py``; torch calls AMD's GPUs
    CUDA too."""
    return tensor.device.type == "cuda"


def has_triton() -> bool:
    """Whether triton is installed (it comes with torch's builds for GPUs, not for CPUs alone)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def in_triton(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: one dtype, one they know, and triton is installed."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return len(dtypes) == 1 and dtypes.pop() in DTYPES and has_triton()
