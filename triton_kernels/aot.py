"""Compiles what the launchers would launch for a GPU that is not there, and reads what came out.

``triton.compile`` needs no GPU; nvdisasm and cuobjdump come with triton. Nothing in the compiler
checks that a kernel fits: shared memory beyond the architecture's limit fails only at launch;
spills and scalar loads are silent. This module counts them.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.triton_kernels.launch import Launch
from r1sae_fast.triton_kernels.targets import TARGETS

__all__ = ["Compiled", "compile_launch", "specialisation", "ttir_faults"]

_POINTER = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """What came out for one kernel, one architecture, one set of constants."""

    kernel: str
    target: str
    registers: int
    """A thread's (HIP: vector registers)."""
    spills: int
    """Bytes a thread, stores and loads together (HIP: scratch)."""
    shared_memory: int
    instructions: dict[str, int] = field(default_factory=dict)
    """How often each instruction of interest occurs in the machine code."""
    warnings: tuple[str, ...] = ()
    """Of the assembler: a serialised pipeline of tensor cores, say."""
    ttir: str = field(default="", repr=False)


# CUDA machine code (SASS): tensor cores by generation and dtype, wide and narrow global loads.
_SASS = {
    "HGMMA": r"\bHGMMA\.",
    "QGMMA": r"\bQGMMA\.",
    "IGMMA": r"\bIGMMA\.",
    "UTCMMA": r"\bUTC[A-Z]*MMA\b",
    "HMMA": r"\bHMMA\.",
    "IMMA": r"\bIMMA\.",
    "QMMA": r"\bQMMA\.",
    "LDG.128": r"\bLDG\.E(\.[A-Z0-9_]+)*\.128",
    "LDG.64": r"\bLDG\.E(\.[A-Z0-9_]+)*\.64",
    "LDG": r"\bLDG\.",
    "LDGSTS": r"\bLDGSTS\.",
    "LDGSTS.128": r"\bLDGSTS\.E(\.[A-Z0-9_]+)*\.128",
    "STG.128": r"\bSTG\.E(\.[A-Z0-9_]+)*\.128",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "UTMALDG": r"\bUTMALDG\b",
    "ATOM": r"\b(ATOMG|RED)\b",
}
_GCN = {
    "MFMA": r"\bv_mfma_",
    "LDG.128": r"\b(global|buffer)_load_dwordx4\b",
    "LDG": r"\b(global|buffer)_load_",
    "STG.128": r"\b(global|buffer)_store_dwordx4\b",
    "ATOM": r"\b(global|buffer)_atomic_",
    "LDL": r"\bscratch_load_",
    "STL": r"\bscratch_store_",
}


def compile_launch(launch: Launch, target_name: str) -> Compiled:
    """Compiles one recorded launch.

    Pointers and whole numbers are specialised as triton does at a launch: addresses and numbers
    divisible by 16 are known to be so, the number 1 is a constant.

    Raises:
        triton's own errors where the kernel can't be compiled.
        RuntimeError: run under the interpreter (TRITON_INTERPRET), which compiles nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.runtime.jit.JITFunction):
        raise RuntimeError("the kernels were loaded for the interpreter; unset TRITON_INTERPRET")
    target = TARGETS[target_name]
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    with tempfile.TemporaryFile() as log, _stderr_to(log):
        compiled = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
        log.seek(0)
        messages = log.read().decode(errors="replace")
    warnings = tuple(line for line in messages.splitlines() if re.search(r"C75\d\d|serializ", line))
    shared = int(compiled.metadata.shared)
    ttir = str(compiled.asm["ttir"])
    if target.backend == "hip":
        text = str(compiled.asm["amdgcn"])
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        counts = {name: len(re.findall(pattern, text)) for name, pattern in _GCN.items()}
    else:
        registers, spills, text = _disassembled(compiled.asm["cubin"])
        counts = {name: len(re.findall(pattern, text)) for name, pattern in _SASS.items()}
    return Compiled(launch.name, target_name, registers, spills, shared, counts, warnings, ttir)


def ttir_faults(ttir: str) -> list[str]:
    """Lines that do arithmetic on bfloat16 registers: slow, imprecise, wrong in the interpreter."""
    fault = re.compile(
        r"\b(arith\.(add|sub|mul|div|rem|neg|max|min|maxnum|minnum|maximum|minimum|cmp)f|math\.\w+)\b"
        r".*bf16\b"
    )
    return [line.strip() for line in ttir.splitlines() if fault.search(line)]


def specialisation(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Argument types, constants and known alignments: all that the compiled kernel depends on."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    declared = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name in declared or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = _POINTER[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool):
            signature[name], aligned = "i1", False
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _disassembled(cubin: bytes) -> tuple[int, int, str]:
    """Registers, spilled bytes and machine code of a CUDA binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        text = _tool("nvdisasm", "-c", str(path))
    stack = _number(r"STACK:(\d+)", usage)
    return _number(r"REG:(\d+)", usage), stack + _number(r"LOCAL:(\d+)", usage), text


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run(
        [str(path), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern} does not occur in the disassembly")
    return int(found.group(1))


class _stderr_to:
    """Sends what the process (the assembler too) writes to stderr to a file."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> None:
        self.saved = os.dup(2)
        os.dup2(self.file.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        os.dup2(self.saved, 2)
        os.close(self.saved)
