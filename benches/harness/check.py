"""``make bench-check`` and ``make bench-baseline``: has a path lost its lead over the reference?

    python -m harness.check             run the small benches, compare, exit 1 where one is slower
    python -m harness.check --write     run them ten times, write the baseline of this CPU class

Times of one machine say nothing about another, nor about the same one when it is busy; the ratio of
two that were measured in turns does, on CPUs of one class. A class without a baseline passes, and
its results are kept beside the baselines' folder, in ``results``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import machine, results
from harness.compare import FATAL, TOLERANCE, better, compare, read_baseline, write_baseline

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "benches"
OPERATIONS = [BENCHES / room for room in ("ops", "sae", "examples", "shards")]
"""What is compared unless told otherwise: single operations, in a minute or two. Whole models are
benches of their own, beside transformers, and take longer."""

AGAIN = 3
"""How often a contest that seems slower is repeated before it fails."""
BUSY = 0.1
"""What part of the CPUs others may take: where a second thread waits for its turn, ours lose more
than a reference that runs on one."""


def run_benches(targets: Sequence[str | Path], seconds: float) -> dict[str, Any]:
    """Runs benches in a process of their own; returns what :func:`harness.results.read` does.

    Raises:
        SystemExit: a bench fails, or none gives a result.
    """
    with tempfile.TemporaryDirectory(prefix="r1sae-bench-") as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", *map(str, targets), "-c", "pyproject.toml"]
        command += ["--rootdir=.", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider", "-q"]
        command += ["--benchmark-only", "--benchmark-quiet", "--no-peers", "--shapes=small"]
        command += [f"--versus-json={path}", f"--versus-seconds={seconds}"]
        # Other plugins only take time to load.
        quick = {"PYTHONPATH": str(BENCHES), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        # Called from a test under xdist, the benches must not take themselves for its workers.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        environment = {**kept, **quick}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if done.returncode or not path.exists():
            raise SystemExit(f"bench-check: the benches themselves failed (exit {done.returncode})")
        return results.read(path)


def comparable(baseline: Path, here: Mapping[str, Any]) -> str | None:
    """None if ratios of this machine may be compared with the baseline's; else why not."""
    there = json.loads(baseline.read_text())["machine"]
    for name in ("torch", "simd"):
        # Of torch, whose code is the reference, the version without its patch and build.
        mine, other = (".".join(str(facts.get(name)).split(".")[:2]) for facts in (here, there))
        if mine != other:
            return f"it was made with {name} {other}, here is {mine}"
    return None


def check(
    targets: Sequence[str | Path],
    baselines: Path,
    *,
    tolerance: float = TOLERANCE,
    fatal: float = FATAL,
    seconds: float = 0.5,
    busy: float = BUSY,
) -> int:
    """Runs, compares, runs what seems slower up to :data:`AGAIN` times more; the exit code."""
    with machine.OthersShare() as others:
        run = run_benches(targets, seconds)
    name = run["machine"]["class"]
    path = baselines / f"{name}.json"
    reason = f"no baseline for this CPU class, {name}"
    if path.exists():
        baseline = read_baseline(path)
        reason = comparable(path, run["machine"]) or ""
    if reason:
        kept = baselines.parent / "results" / f"{name}.json"
        write_baseline(kept, [run])
        print(f"bench-check: {reason}: nothing to compare with, so")
        print(f"  this passes; recorded in {kept}. To have it compared: make bench-baseline")
        return 0
    found = {result["name"]: result for result in run["results"]}
    quiet = others.share <= busy
    for _ in range(AGAIN):
        slow = [v.name for v in compare(found.values(), baseline, tolerance, fatal) if v.slow]
        again = sorted({found[name]["test"] for name in slow if name in found})
        if not again:
            break
        print(f"bench-check: {len(again)} seem slower; once more, for longer", flush=True)
        with machine.OthersShare() as others:
            repeated = run_benches(again, 2 * seconds)["results"]
        quiet = quiet or others.share <= busy
        for result in repeated:
            found[result["name"]] = better(found[result["name"]], result)
    verdicts = compare(found.values(), baseline, tolerance, fatal)
    print(
        f"\nbench-check against {path.name} (a path that lost {tolerance:.0%} of its lead is told, "
        f"one that lost {fatal:.0%} more than chance takes fails)"
    )
    for verdict in verdicts:
        print(f"  {verdict.line()}")
    failed = sum(verdict.failed for verdict in verdicts)
    gone = any(verdict.failed and verdict.found is None for verdict in verdicts)
    if failed and not gone and not quiet:
        print(
            f"bench-check: {failed} of {len(verdicts)} seem slower, but others took more than "
            f"{busy:.0%} of the CPUs in every run ({others.share:.0%} in the last): that tells "
            "nothing, so this passes"
        )
        return 0
    slower = sum(verdict.slow for verdict in verdicts)
    if failed:
        print(f"bench-check: {failed} of {len(verdicts)} failed")
    elif slower:
        print(f"bench-check: {slower} of {len(verdicts)} slower, none so much that it fails")
    else:
        print("bench-check: all well")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; see the module."""
    parser = argparse.ArgumentParser(
        prog="harness.check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("targets", nargs="*", default=OPERATIONS, help="default: operations")
    parser.add_argument("--write", action="store_true", help="write the baseline of this CPU class")
    parser.add_argument("--runs", type=int, default=10, help="whose medians are the baseline")
    parser.add_argument("--baselines", type=Path, default=BENCHES / "baselines")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--fatal", type=float, default=FATAL, help="what fails, beyond chance")
    parser.add_argument("--busy", type=float, default=BUSY, help="what others may take of the CPUs")
    parser.add_argument("--seconds", type=float, default=0.5, help="for one contest")
    chosen = parser.parse_args(arguments)
    if not chosen.write:
        return check(
            chosen.targets,
            chosen.baselines,
            tolerance=chosen.tolerance,
            fatal=chosen.fatal,
            seconds=chosen.seconds,
            busy=chosen.busy,
        )
    runs = [run_benches(chosen.targets, chosen.seconds) for _ in range(chosen.runs)]
    path = chosen.baselines / f"{runs[0]['machine']['class']}.json"
    write_baseline(path, runs)
    compared = len(read_baseline(path))
    print(f"wrote {path}: {compared} contests, medians of {len(runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
