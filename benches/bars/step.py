"""P3: a whole training step beside sparsify's, and each one's peak memory.

A step is forward, backward, gradient norm and clipping, Adam, and the decoder's rows brought back
to norm 1; what sparsify takes for forward and backward alone is told too.
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
_BATCHES = 4
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


def steps(shape: Shape, rows: int, rounds: int, *, whole: bool = True) -> Section:
    """The contest at one batch size.

    Args:
        whole: whether sparsify's whole step runs too; with 2048 rows of R1's shape the gradients
            alone take it 10 GB, and Adam's state as much as the weights thrice.
    """
    # Each step meets other rows, as in a run: features that fire differ, and so do rows that rest.
    batches = [make_x(rows, shape.d_in, torch.float32, seed=1 + i) for i in range(_BATCHES)]
    at = dict.fromkeys(("ours", "sparsify", "gradients"), 0)

    def batch(who: str) -> Tensor:
        at[who] += 1
        return batches[at[who] % _BATCHES]

    ours, peer = our_step(shape), sparsify(shape)
    calls: dict[str, Callable[[], object]] = {"ours": lambda: ours(batch("ours"))}
    for _ in range(_BATCHES):
        calls["ours"]()  # until nearly all features have moments
    if whole:
        theirs = their_step(peer)
        calls["sparsify"] = lambda: theirs(batch("sparsify"))

    def gradients() -> None:
        peer.step(batch("gradients"))
        peer.module.zero_grad(set_to_none=True)

    calls["sparsify_without_adam"] = gradients
    result = in_turns(f"P3 training step float32, {rows} rows", calls, Budget(rounds=rounds))
    result.work = (rows, "tokens")
    bars = [
        Bar("P3", f"step of {rows} rows beside {name}", result.ratio(name), 6.0)
        for name in result.others
    ]
    return Section([result], bars)


def peak_memory(who: str, shape: Shape, rows: int) -> int:
    """Bytes at most, of a process that does two steps and nothing else."""
    code = f"from bars.step import measure; measure({who!r}, {shape.name!r}, {rows})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(who: str, shape: str, rows: int) -> None:
    """The program of :func:`peak_memory`."""
    size = SHAPES[shape]
    step = our_step(size) if who == "ours" else their_step(sparsify(size))
    for seed in range(2):
        step(make_x(rows, size.d_in, torch.float32, seed=seed))
    print(memory_field("VmHWM"))


def memory(shape: Shape, rows: int) -> Section:
    """Peak resident memory of one process each."""
    ours, theirs = (peak_memory(who, shape, rows) for who in ("ours", "sparsify"))
    what = f"peak memory at {rows} rows: {ours / 1e9:.2f} of {theirs / 1e9:.2f} GB"
    return Section([], [Bar("P3", what, ours / theirs, most=0.6, unit="of sparsify's")])
