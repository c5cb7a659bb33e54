"""``python -m quality [NAME[@LEARNING_RATE] ...] --folder DIR --tokens N``: trains those that are
not there yet, each in a process of its own, and prints the table of all that are.

``--speed STEPS`` trains all named in turns, for so many steps, and compares only their tokens/s.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from quality.contenders import NAMES, contender
from quality.data import Task, prepare
from quality.scoring import score
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import metrics
from r1sae_fast.train.metrics import read_lines, time_shares


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; see the module."""
    parser = argparse.ArgumentParser(prog="quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; @ a learning rate")
    parser.add_argument("--folder", type=Path, required=True, help="gone on with where it is left")
    parser.add_argument("--tokens", type=int, default=2_000_896)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("-k", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--speed", type=int, metavar="STEPS")
    parser.add_argument("--rounds", type=int, default=1, help="of --speed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    for name in chosen.names:
        if name.partition("@")[0] not in NAMES:
            parser.error(f"unknown contender {name!r}; expected some of {', '.join(NAMES)}")
    if chosen.child:
        run(chosen)
        return 0
    prepare(chosen.folder, chosen.tokens)
    if chosen.speed:
        race(chosen)
        return 0
    for name in chosen.names:
        if not (place(chosen, name) / "result.json").exists():
            child(chosen, name)
    show(chosen)
    return 0


def place(chosen: argparse.Namespace, name: str) -> Path:
    """The folder of a run: settings that decide it are in its name."""
    settings = (chosen.tokens, chosen.d_sae, chosen.k, chosen.batch_size, chosen.seed)
    runs: Path = chosen.folder / "runs" / "-".join(map(str, settings))
    return runs / name


def child(chosen: argparse.Namespace, name: str, *further: str) -> None:
    """Trains one contender in a new process."""
    settings = ("folder", "tokens", "d_sae", "batch_size", "seed", "threads")
    given = [f"--{key.replace('_', '-')}={getattr(chosen, key)}" for key in settings]
    command = [sys.executable, "-m", "quality", *given, f"-k={chosen.k}", f"--child={name}"]
    print(f"{name} ...", file=sys.stderr, flush=True)
    finished = subprocess.run([*command, *further], capture_output=True, text=True, check=False)
    if finished.returncode:
        print(finished.stdout[-2000:], finished.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"{name} failed")


def run(chosen: argparse.Namespace) -> None:
    """The child: trains, saves, measures."""
    name, _, rate = chosen.child.partition("@")
    folder = place(chosen, chosen.child)
    folder.mkdir(parents=True, exist_ok=True)
    shards = ActivationShards(chosen.folder / f"train-{chosen.tokens}" / "shards")
    steps = chosen.speed or chosen.tokens // chosen.batch_size
    train = contender(name)
    with tempfile.TemporaryDirectory(prefix="r1sae-quality-") as scratch:
        # Ours goes on from its checkpoint; what times are measured is another matter.
        own = Path(scratch) if chosen.speed else folder
        task = Task(shards, own, chosen.d_sae, chosen.k, steps, chosen.batch_size, chosen.seed)
        before, start = _cpu(), time.perf_counter()
        sae = train(task, float(rate) if rate else None)
        seconds, cpu = time.perf_counter() - start, _cpu() - before
        # Of ours alone.
        shares = time_shares(read_lines(own / "run" / metrics.FILE))
    found: dict[str, Any] = {
        "name": chosen.child,
        "tokens": task.tokens,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens_per_second": task.tokens / seconds,
        "tokens_per_cpu_second": task.tokens / cpu,
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "time_shares": shares,
    }
    if chosen.speed:
        print(json.dumps(found))
        return
    sae.save(folder / "sae")
    held_out = ActivationShards(chosen.folder / "held-out" / "shards")
    found |= score(sae, held_out, shards)
    for rest in ("run", "dictionary_learning", "sparsify"):
        shutil.rmtree(folder / rest, ignore_errors=True)
    temporary = folder / "result.json.tmp"
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(folder / "result.json")


def race(chosen: argparse.Namespace) -> None:
    """Tokens/s, all in turns."""
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.names}
    for _ in range(chosen.rounds):
        for name in chosen.names:
            given = (f"--folder={chosen.folder}", f"--tokens={chosen.tokens}")
            settings = (f"--d-sae={chosen.d_sae}", f"-k={chosen.k}", f"--seed={chosen.seed}")
            more = (f"--batch-size={chosen.batch_size}", f"--threads={chosen.threads}")
            command = [sys.executable, "-m", "quality", *given, *settings, *more]
            done = subprocess.run(
                [*command, f"--child={name}", f"--speed={chosen.speed}"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            times[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    for name, found in times.items():
        rates = [median(one[key] for one in found) for key in _RATES]
        peak = median(one["peak_bytes"] for one in found) / 1e6
        print(f"{name:34s} {rates[0]:>9,.0f} tokens/s {rates[1]:>9,.0f} a CPU second "
              f"{peak:>7,.0f} MB")  # fmt: skip
        if shares := found[-1]["time_shares"]:
            print("    " + ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))


_RATES = ("tokens_per_second", "tokens_per_cpu_second")


def show(chosen: argparse.Namespace) -> None:
    """The table."""
    files = sorted(place(chosen, "x").parent.glob("*/result.json"))
    found = sorted((json.loads(file.read_text()) for file in files), key=lambda one: one["fvu"])
    print(f"{'':40s}     FVU   own FVU     L0   dead   CE recovered (mean)      KL  tokens/CPU s")
    for one in found:
        print(
            f"{one['name']:40s} {one['fvu']:.5f}  {one['fvu_on_training_rows']:.5f}  "
            f"{one['l0']:6.2f}  {one['dead']:5.1%}  {one['ce_recovered']:.5f} "
            f"({one['ce_recovered_mean']:.5f})  {one['kl']:.5f}  "
            f"{one['tokens_per_cpu_second']:>9,.0f}"
        )


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
