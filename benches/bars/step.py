"""P3: a training step's forward and backward beside sparsify's, and each one's peak memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bars.data import make_sae, make_x
from bars.report import Bar, Section
from harness.memory import field as memory_field
from harness.shapes import SHAPES, Shape
from harness.timing import Budget, in_turns
from peers import installed


def stepper(who: str, shape: Shape) -> Callable[[Tensor], object]:
    """One step of ours or of a peer's: forward, backward, all gradients."""
    sae = make_sae(shape, "topk", torch.float32)
    if who != "ours":
        with torch.no_grad():
            weights = [t.detach() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)]
        return installed()[who](*weights, shape.k).step

    def step(x: Tensor) -> None:
        sae.zero_grad(set_to_none=True)
        loss = (sae(x)[0] - x).pow(2).sum(-1).mean()
        loss.backward()

    return step


def peak_memory(who: str, shape: Shape, rows: int) -> int:
    """Bytes at most, of a process that does two steps; and does nothing else."""
    code = f"from bars.step import measure; measure({who!r}, {shape.name!r}, {rows})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(who: str, shape: str, rows: int) -> None:
    """The program of :func:`peak_memory`."""
    size = SHAPES[shape]
    step = stepper(who, size)
    x = make_x(rows, size.d_in, torch.float32)
    step(x)
    step(x)
    print(memory_field("VmHWM"))


def steps(shape: Shape, rows: int, rounds: int) -> Section:
    """The contest at one batch size."""
    x = make_x(rows, shape.d_in, torch.float32)
    ours, theirs = stepper("ours", shape), stepper("sparsify", shape)
    result = in_turns(
        f"P3 forward and backward float32, {rows} rows",
        {"ours": lambda: ours(x), "sparsify": lambda: theirs(x)},
        Budget(rounds=rounds),
    )
    result.work = (rows, "tokens")
    return Section([result], [Bar("P3", f"step of {rows} rows", result.ratio("sparsify"), 6.0)])


def memory(shape: Shape, rows: int) -> Section:
    """Peak resident memory of one process each."""
    ours, theirs = (peak_memory(who, shape, rows) for who in ("ours", "sparsify"))
    what = f"peak memory at {rows} rows: {ours / 1e9:.2f} of {theirs / 1e9:.2f} GB"
    return Section([], [Bar("P3", what, ours / theirs, most=0.6, unit="of sparsify's")])
