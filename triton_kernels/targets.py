"""The GPU architectures that the kernels are compiled and tabulated for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["INTERPRETER", "TARGETS", "Target", "target_of"]

INTERPRETER = "interpreter"
"""The target name of tensors on the CPU: triton's interpreter runs them, slowly, in tests."""


@dataclass(frozen=True)
class Target:
    """One architecture. Limits are the vendor's for one block (CUDA) or workgroup (HIP)."""

    name: str
    backend: str
    """``cuda`` or ``hip``, as triton calls it."""
    arch: int | str
    warp_size: int
    shared_memory: int
    """Bytes of shared memory that one block may use."""


# CUDA programming guide, table "Technical specifications per compute capability";
# AMD CDNA3 ISA guide (64 KiB of LDS a workgroup).
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912),
        Target("sm_90", "cuda", 90, 32, 232_448),
        Target("sm_100", "cuda", 100, 32, 232_448),
        Target("gfx942", "hip", "gfx942", 64, 65_536),
    )
}


def target_of(device: torch.device) -> str:
    """The name of the architecture to configure for: one of :data:`TARGETS` or the interpreter.

    An architecture that is not listed takes the settings of the nearest listed one of its vendor.
    """
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x has neither wgmma nor tensor memory, and no more shared memory than 8.6 and 8.9.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
