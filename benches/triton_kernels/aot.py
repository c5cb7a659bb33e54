"""Compiles every kernel for every architecture, without a GPU, and writes what came out.

make aot                       rewrites benches/triton_kernels/aot.md
python benches/triton_kernels/aot.py --target sm_90 --json table.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1sae_fast.triton_kernels.aot import compile_launch, specialisation, ttir_faults
from r1sae_fast.triton_kernels.cases import CASES, launches
from r1sae_fast.triton_kernels.targets import TARGETS

TENSOR_CORES = ("HGMMA", "QGMMA", "IGMMA", "UTCMMA", "HMMA", "IMMA", "QMMA", "MFMA")
SHOWN = (*TENSOR_CORES, "LDG.128", "LDGSTS.128", "LDG", "ATOM")


def table(targets: list[str], families: list[str]) -> Iterator[dict[str, Any]]:
    """One row a kernel, case and target; a kernel that several cases share is compiled once."""
    for target in targets:
        seen: dict[str, Any] = {}
        listed: set[tuple[str, str]] = set()
        for generator in CASES:
            for case in generator():
                if target not in case.targets or (families and case.family not in families):
                    continue
                for launch in launches(case, target):
                    key = repr(
                        (launch.name, launch.num_warps, launch.num_stages, specialisation(launch))
                    )
                    if key not in seen:
                        seen[key] = compile_launch(launch, target)
                    if (case.name, key) in listed:
                        continue
                    listed.add((case.name, key))
                    found = seen[key]
                    about = not case.of or case.of == launch.name
                    yield {
                        "target": target,
                        "family": case.family,
                        "case": case.name,
                        "kernel": launch.name,
                        "warps": launch.num_warps,
                        "stages": launch.num_stages,
                        "registers": found.registers,
                        "spills": found.spills,
                        "shared_memory": found.shared_memory,
                        "found": {name: n for name, n in found.instructions.items() if n},
                        "wants": list(case.wanted(target)) if about else [],
                        "warnings": list(found.warnings),
                        "ttir_faults": ttir_faults(found.ttir),
                    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, for people."""
    import triton

    lines = [
        "# What the kernels compile to",
        "",
        "Computed by `make aot` without a GPU: nothing here is a measured time. Registers and",
        "spilled bytes a thread, bytes of shared memory a block, how often an instruction occurs",
        f"in the machine code. triton {triton.__version__}.",
        "",
        "| target | kernel | case | warps | stages | registers | spills | shared | instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = ", ".join(f"{name} {row['found'][name]}" for name in SHOWN if name in row["found"])
        lines.append(
            f"| {row['target']} | {row['kernel']} | {row['case']} | {row['warps']} "
            f"| {row['stages']} | {row['registers']} | {row['spills']} "
            f"| {row['shared_memory']} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), default=[])
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    rows = list(table(arguments.target or list(TARGETS), arguments.family))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))
    if not arguments.json and not arguments.markdown:
        sys.stdout.write(markdown(rows))


if __name__ == "__main__":
    main()
