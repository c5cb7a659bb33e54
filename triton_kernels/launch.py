"""The one door through which launchers start kernels.

A launcher works on a GPU, on the CPU under triton's interpreter, and, while :func:`recording`, on
tensors of the ``meta`` device, which hold no data: then nothing runs, and what would have been
launched is listed. So the ahead-of-time compiler sees exactly what the launchers launch, and a
launcher that looks at a tensor's contents (a wait for the GPU) fails there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.triton_kernels.targets import target_of

__all__ = ["Launch", "current_target", "launch", "recording"]

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: which kernel, how many programs, with what."""

    kernel: Any
    grid: Grid
    arguments: dict[str, Any]
    """By the kernel's parameter names, ``tl.constexpr`` ones included."""
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return str(self.kernel.fn.__name__)


_RECORD: ContextVar[tuple[str, list[Launch]] | None] = ContextVar("record", default=None)


@contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Lists launches instead of running them, with the settings for ``target``."""
    launches: list[Launch] = []
    token = _RECORD.set((target, launches))
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def current_target(device: torch.device) -> str:
    """The target that a launcher configures for: the recorded one, else the device's own."""
    record = _RECORD.get()
    return target_of(device) if record is None else record[0]


def launch(
    kernel: Any, grid: Grid, *arguments: Any, num_warps: int, num_stages: int = 1, **constants: Any
) -> None:
    """Runs ``kernel`` on ``grid`` programs, on the device of its first tensor.

    An empty grid runs nothing: CUDA would refuse it.
    """
    record = _RECORD.get()
    if record is not None:
        by_name = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        record[1].append(Launch(kernel, grid, by_name, num_warps, num_stages))
        return
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        kernel[grid](*arguments, **constants)
