"""``make bench-check`` and ``make bench-baseline``: has a path lost its lead over the reference?

    python -m harness.check             run the small benches, compare, exit 1 where one is slower
    python -m harness.check --write     run them three times, write the baseline of this CPU class

Times of one machine say nothing about another, nor about the same one when it is busy; the ratio of
two that were measured in turns does, on CPUs of one class. A class without a baseline passes, and
its results are kept beside the baselines' folder, in ``results``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import results
from harness.compare import TOLERANCE, better, compare, read_baseline, write_baseline

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "benches"
OPERATIONS = [BENCHES / room for room in ("ops", "sae", "examples", "shards")]
"""What is compared unless told otherwise: single operations, in a minute or two. Whole models are
benches of their own, beside transformers, and take longer."""


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


def check(
    targets: Sequence[str | Path],
    baselines: Path,
    *,
    tolerance: float = TOLERANCE,
    seconds: float = 0.5,
) -> int:
    """Runs, compares, runs once more what seems slower; the exit code."""
    run = run_benches(targets, seconds)
    name = run["machine"]["class"]
    path = baselines / f"{name}.json"
    if not path.exists():
        kept = baselines.parent / "results" / f"{name}.json"
        write_baseline(kept, [run])
        print(f"bench-check: no baseline for this CPU class, {name}: nothing to compare with, so")
        print(f"  this passes; recorded in {kept}. To have it compared: make bench-baseline")
        return 0
    baseline = read_baseline(path)
    found = {result["name"]: result for result in run["results"]}
    slow = [v.name for v in compare(found.values(), baseline, tolerance) if v.failed]
    again = sorted({found[name]["test"] for name in slow if name in found})
    if again:
        print(f"bench-check: {len(again)} seem slower; once more, for longer", flush=True)
        for result in run_benches(again, 4 * seconds)["results"]:
            found[result["name"]] = better(found[result["name"]], result)
    verdicts = compare(found.values(), baseline, tolerance)
    print(f"\nbench-check against {path.name} (a path may lose {tolerance:.0%} of its lead)")
    for verdict in verdicts:
        print(f"  {verdict.line()}")
    failed = sum(verdict.failed for verdict in verdicts)
    print(f"bench-check: {failed} of {len(verdicts)} failed" if failed else "bench-check: all well")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; see the module."""
    parser = argparse.ArgumentParser(
        prog="harness.check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("targets", nargs="*", default=OPERATIONS, help="default: operations")
    parser.add_argument("--write", action="store_true", help="write the baseline of this CPU class")
    parser.add_argument("--runs", type=int, default=3, help="whose median is the baseline")
    parser.add_argument("--baselines", type=Path, default=BENCHES / "baselines")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--seconds", type=float, default=0.5, help="for one contest")
    chosen = parser.parse_args(arguments)
    if not chosen.write:
        return check(
            chosen.targets, chosen.baselines, tolerance=chosen.tolerance, seconds=chosen.seconds
        )
    runs = [run_benches(chosen.targets, chosen.seconds) for _ in range(chosen.runs)]
    path = chosen.baselines / f"{runs[0]['machine']['class']}.json"
    write_baseline(path, runs)
    compared = len(read_baseline(path))
    print(f"wrote {path}: {compared} contests, medians of {len(runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
