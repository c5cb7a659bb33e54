"""``python -m bars P1 P4 --shape r1``: measures bars, prints each contest and each bar on a line.

Every section holds what it needs and no more (P1: two SAEs of 0.8 GB in float32; P3 up to 14 GB),
so give each a process of its own: ``make bench-r1`` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bars import forward, growth, heaps, select, shards, step
from bars.report import Section
from harness import machine
from harness.shapes import SHAPES, Shape

Run = Callable[[Shape, argparse.Namespace], Section]

SECTIONS: dict[str, Run] = {
    "P1": lambda s, a: forward.forward("P1", torch.float32, s, a.rounds, a.amx),
    "P2": lambda s, a: forward.forward("P2", torch.bfloat16, s, a.rounds, a.amx),
    "small-f32": lambda s, a: forward.small_batches(torch.float32, s, 3 * a.rounds),
    "small-bf16": lambda s, a: forward.small_batches(torch.bfloat16, s, 3 * a.rounds),
    "P3-256": lambda s, a: step.steps(s, 256, a.rounds),
    "P3-2048": lambda s, a: step.steps(s, 2048, max(2, a.rounds // 2), whole=False),
    "P3-memory": lambda s, a: step.memory(s, 256),
    "P3-memory-2048": lambda s, a: step.memory(s, 2048),
    "P4": lambda s, a: select.select(s, 3 * a.rounds),
    "P5": lambda s, a: heaps.heaps(a.folder, s, a.code_rows, a.rounds),
    "P6": lambda s, a: shards.gathers(a.folder, s, a.rows, a.rounds),
    "P9-heaps": lambda s, a: growth.heaps(a.folder, s, a.code_rows),
    "P9-shards": lambda s, a: growth.reading(a.folder, s, a.rows),
    "P9-encode": lambda s, a: growth.encoding(a.folder, a.growth_rows),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; see the module. Always 0: a missed bar is a finding, not an error."""
    parser = argparse.ArgumentParser(prog="bars", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="r1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1 << 17, help="rows for P6 and P9")
    parser.add_argument("--code-rows", type=int, default=1 << 21, help="rows of codes for P5")
    parser.add_argument("--growth-rows", type=int, default=500_000, help="the most that P9 encodes")
    parser.add_argument("--folder", type=Path, help="where P5 and P6 keep their shards")
    parser.add_argument("--json", type=Path, help="append what is found, a JSON line a section")
    parser.add_argument("--prepare", action="store_true", help="write P5's and P6's shards only")
    chosen = parser.parse_args(arguments)
    chosen.amx = "amx_int8" in machine.cpu()["features"]
    shape = SHAPES[chosen.shape]
    with tempfile.TemporaryDirectory(prefix="r1sae-bars-") as scratch:
        chosen.folder = chosen.folder or Path(scratch)
        chosen.folder.mkdir(parents=True, exist_ok=True)
        if chosen.prepare:
            heaps.prepare(chosen.folder, shape, chosen.code_rows)
            shards.prepare(chosen.folder, shape, chosen.rows)
            return 0
        for name in chosen.sections or SECTIONS:
            start = time.perf_counter()
            section = SECTIONS[name](shape, chosen)
            for line in section.lines():
                print(line, flush=True)
            if chosen.json is not None:
                append(chosen.json, name, shape, section)
            print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    return 0


def append(path: Path, name: str, shape: Shape, section: Section) -> None:
    """One JSON line: the section, the machine, contests and bars."""
    found = {
        "section": name,
        "shape": vars(shape),
        "machine": machine.facts(),
        "results": [result.summary() for result in section.results],
        "bars": [bar.to_dict() for bar in section.bars],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
