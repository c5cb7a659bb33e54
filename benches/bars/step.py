"""P3: a whole training step beside sparsify's, and each one's peak memory.

A step is forward, backward, gradient norm and clipping, Adam, and the decoder's rows brought back
to norm 1.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bars.data import make_x
from bars.report import Bar, Section
from harness.memory import field as memory_field
from harness.shapes import SHAPES, Shape
from harness.timing import Budget, in_turns
from peers import Peer, installed
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.step import Learner

RATE = 1e-4
# Before the contest: rows enough that nearly all features have codes, so that they have moments.
_WARM_ROWS, _WARM_STEPS = 2048, 3
Step = Callable[[Tensor], object]


def our_step(shape: Shape) -> Step:
    """What ``r1sae train`` does with a batch."""
    config = TrainConfig(shape.d_sae, shape.k, "topk", tokens=10**9, learning_rate=RATE)
    learner = Learner(config, shape.d_in, torch.device("cpu"))
    return lambda x: learner.step(x, RATE)


def sparsify(shape: Shape) -> Peer:
    """sparsify's SAE with random unit rows, encoder and decoder apart."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(shape.d_sae, shape.d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    biases = torch.zeros(shape.d_sae), torch.zeros(shape.d_in)
    return installed()["sparsify"](W_dec.clone().T, W_dec, *biases, shape.k)


def their_step(peer: Peer) -> Step:
    """As sparsify's trainer: Adam, in torch's quickest form, then unit rows."""
    optimizer = torch.optim.Adam(peer.parameters(), lr=RATE, fused=True)

    def step(x: Tensor) -> None:
        peer.step(x)
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        peer.after_step()

    return step


def fresh_batches(shape: Shape, rows: int, count: int) -> list[Tensor]:
    """Batches ``[rows, d_in]`` of which no two are alike."""
    return [make_x(rows, shape.d_in, torch.float32, seed=1 + i) for i in range(count)]


def steps(shape: Shape, rows: int, rounds: int, *, whole: bool = True) -> Section:
    """The contest at one batch size. As in a run nobody meets a batch twice, and nearly all
    features have fired before: those without codes in a batch move on by their momentum.

    Args:
        whole: whether sparsify's whole step is taken, or its forward and backward alone, which
            need 5 GB less at R1's shape.
    """
    ours, peer = our_step(shape), sparsify(shape)
    for x in fresh_batches(shape, _WARM_ROWS, _WARM_STEPS):
        ours(x)
    # Warming up takes one or two.
    batches = fresh_batches(shape, rows, rounds + 2)
    step = their_step(peer) if whole else peer.step

    def in_order(step: Step) -> Callable[[], object]:
        rest = iter(batches)
        return lambda: step(next(rest))

    name = "sparsify" if whole else "sparsify_without_adam"
    calls = {"ours": in_order(ours), name: in_order(step)}
    result = in_turns(f"P3 training step float32, {rows} rows", calls, Budget(rounds=rounds))
    result.work = (rows, "tokens")
    return Section(
        [result], [Bar("P3", f"step of {rows} rows beside {name}", result.ratio(name), 6.0)]
    )


def peak_memory(who: str, shape: Shape, rows: int) -> int:
    """Bytes at most, of a process that takes a few steps of other rows each and nothing else."""
    code = f"from bars.step import measure; measure({who!r}, {shape.name!r}, {rows})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(who: str, shape: str, rows: int) -> None:
    """The program of :func:`peak_memory`."""
    size = SHAPES[shape]
    # Theirs has moments of all features after the first; ours once each has fired.
    step, count = (our_step(size), 12) if who == "ours" else (their_step(sparsify(size)), 2)
    for seed in range(count * 256 // rows + 2):
        step(make_x(rows, size.d_in, torch.float32, seed=seed))
    print(memory_field("VmHWM"))


def memory(shape: Shape, rows: int) -> Section:
    """Peak resident memory of one process each."""
    ours, theirs = (peak_memory(who, shape, rows) for who in ("ours", "sparsify"))
    what = f"peak memory at {rows} rows: {ours / 1e9:.2f} of {theirs / 1e9:.2f} GB"
    return Section([], [Bar("P3", what, ours / theirs, most=0.6, unit="of sparsify's")])
