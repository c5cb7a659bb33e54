"""Compiles a kernel with the faults that the ahead-of-time gate is there for, and prints them."""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from r1sae_fast.triton_kernels.aot import compile_launch, ttir_faults
from r1sae_fast.triton_kernels.launch import launch, recording


@triton.jit
def faulty_kernel(source, target, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Adds bfloat16 registers, holds far more numbers than there are registers, reads by twos."""
    place = tl.arange(0, SIZE)[:, None] * WIDTH + tl.arange(0, SIZE)[None, :]
    numbers = tl.load(source + place)
    numbers = numbers + numbers
    turned = tl.trans(numbers)
    tl.store(target + place, numbers * turned)


def main() -> None:
    given = torch.empty(128 * 131, dtype=torch.bfloat16, device="meta")
    with recording("sm_90") as launches:
        launch(faulty_kernel, (1,), given, given, num_warps=1, WIDTH=131, SIZE=128)
    found = compile_launch(launches[0], "sm_90")
    report = {
        "spills": found.spills,
        "wide_loads": found.instructions["LDG.128"],
        "ttir_faults": ttir_faults(found.ttir),
    }
    sys.stdout.write(json.dumps(report))


main()
