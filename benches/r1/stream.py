"""Streaming against resident: peak memory, throughput, and whether the bits are the same.

    python benches/r1/make_checkpoint.py DIR
    python benches/r1/stream.py DIR --max-memory 700MB [--layer 17] [--tokens 16384]

Each engine runs in a process of its own; their memory (RssAnon + RssShmem) is read from outside
every 2 ms. Exits 1 if the rows differ or the cap was passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("resident", "stream")


def sequences(tokens: int, length: int) -> list[list[int]]:
    """Ragged random sequences, up to ``length`` long."""
    import torch

    generator = torch.Generator().manual_seed(1)
    found: list[list[int]] = []
    while sum(map(len, found)) < tokens:
        size = int(torch.randint(length // 2, length + 1, (), generator=generator))
        found.append(torch.randint(3, 500, (size,), generator=generator).tolist())
    return found


def child(arguments: argparse.Namespace) -> None:
    """Runs one engine over all sequences; prints what it found as JSON."""
    import torch

    from r1sae_fast.r1 import LocalEngine
    from r1sae_fast.r1.engines.base import Engine
    from r1sae_fast.r1.engines.stream import StreamEngine
    from r1sae_fast.r1.stream.plan import StreamPlan
    from r1sae_fast.r1.stream.sizes import parse_size

    torch.set_num_threads(arguments.threads)
    given = sequences(arguments.tokens, arguments.length)
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype), "fp8": arguments.fp8}
    plans: list[StreamPlan] = []
    planned: list[float] = []

    def on_plan(plan: StreamPlan) -> None:
        plans.append(plan)
        planned.append(time.monotonic())

    load = time.monotonic()
    engine: Engine
    if arguments.kind == "resident":
        engine = LocalEngine.from_pretrained(
            arguments.checkpoint, last_layer=arguments.layer, **options
        )
        # The weights are dequantised at their first use: that is loading, too.
        list(engine.rows([given[0][:9]], arguments.layer, batch_size=1))
    else:
        engine = StreamEngine(
            arguments.checkpoint,
            max_memory=parse_size(arguments.max_memory),
            scratch=arguments.scratch,
            on_plan=on_plan,
            **options,
        )
    begin = time.monotonic()
    digest, rows = hashlib.sha256(), 0
    for _, values in engine.rows(given, arguments.layer, batch_size=arguments.batch_size):
        digest.update(values.view(torch.uint8).numpy().data)
        rows += values.shape[0]
    # Measuring the machine's speeds is done once, however many tokens there are.
    started = planned[0] if planned else begin
    seconds = time.monotonic() - started
    report: dict[str, Any] = {
        "kind": arguments.kind,
        "rows": rows,
        "seconds": seconds,
        "load_seconds": begin - load,
        "plan_seconds": started - begin,
        "tokens_per_second": rows / seconds,
        "sha256": digest.hexdigest(),
    }
    for plan in plans:
        report["plan"] = {
            "group": plan.group,
            "ahead": plan.ahead,
            "weight_cache": plan.weight_cache,
            "chunks": plan.chunks,
            "peak": plan.peak,
            "memory": plan.memory,
            "seconds": plan.seconds,
        }
    sys.stdout.write(json.dumps(report) + "\n")


def measure(kind: str, scratch: Path) -> dict[str, Any]:
    """Runs a child with these arguments and watches its memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, "--scratch", str(scratch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        except OSError:
            break
        sizes = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if "RssAnon" in sizes:
            own = sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
            peak = max(peak, own)
        time.sleep(0.002)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{kind}: exit code {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak": peak}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--max-memory", default="700MB")
    parser.add_argument("--layer", type=int, default=17)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--fp8", default="w8a8", choices=("w8a8", "dequantize"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        child(arguments)
        return
    from r1sae_fast.r1.stream.sizes import parse_size

    with tempfile.TemporaryDirectory() as folder:
        kinds = [arguments.only] if arguments.only else list(KINDS)
        found = {kind: measure(kind, Path(folder)) for kind in kinds}
    for report in found.values():
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    cap = parse_size(arguments.max_memory)
    passed = "stream" not in found or found["stream"]["peak"] <= cap
    if len(found) == len(KINDS):
        same = len({report["sha256"] for report in found.values()}) == 1
        ratio = found["stream"]["tokens_per_second"] / found["resident"]["tokens_per_second"]
        sys.stdout.write(f"same bits: {same}; throughput ratio: {ratio:.3f}\n")
        passed = passed and same
    if "stream" in found:
        sys.stdout.write(f"cap {cap}, peak {found['stream']['peak']}\n")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
