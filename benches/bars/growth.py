"""P9: ten times the tokens take ten times as long, and no more memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from bars.data import make_sae
from bars.heaps import N
from bars.heaps import prepare as prepare_codes
from bars.report import Bar, Section
from bars.shards import warm, write_rows
from harness.memory import PeakAnonymous
from harness.shapes import SHAPES, Shape
from harness.timing import timed
from r1sae_fast.encode import encode_shards
from r1sae_fast.examples import collect_examples
from r1sae_fast.shards import ActivationShards, CodeShards

MEGABYTE = 1 << 20
BATCH = 2048
TIMES = 3
"""How often each size is timed."""


def grown(name: str, sizes: list[int], work: Callable[[int], Callable[[], object]]) -> list[Bar]:
    """Bars for one kind of work: ``work(size)`` prepares it and returns what is to be timed."""
    bars: list[Bar] = []
    seconds = memory = 0.0
    for size in sizes:
        call = work(size)
        call()
        with PeakAnonymous() as peak:
            took = statistics.median(timed(call) for _ in range(TIMES))
        if seconds:
            factor = took / seconds
            more = (peak.grown - memory) / MEGABYTE
            what = f"{name}, {size // 10} to {size} rows"
            bars.append(Bar("P9", f"{what}: time", factor, most=11.0))
            bars.append(Bar("P9", f"{what}: more memory", more, most=16.0, unit="MB"))
        seconds, memory = took, peak.grown
    return bars


def heaps(folder: Path, shape: Shape, rows: int) -> Section:
    """Heaps from code shards."""

    def work(size: int) -> Callable[[], object]:
        shards = CodeShards(prepare_codes(folder, shape, size))
        warm(*shards.paths)
        return lambda: collect_examples(shards, N, progress=False)

    return Section([], grown("heaps", [rows // 100, rows // 10, rows], work))


def reading(folder: Path, shape: Shape, rows: int) -> Section:
    """A shuffled epoch of activation shards, in batches of which the smallest size has several."""
    d_in, batch = shape.d_in, min(BATCH, max(1, rows // 500))

    def work(size: int) -> Callable[[], object]:
        place = folder / f"rows-{size}-{d_in}"
        if not place.exists():
            write_rows(place, d_in, size)
        shards = ActivationShards(place)
        warm(*shards.paths)
        loader = shards.loader(batch, seed=0)
        return lambda: sum(len(batch) for batch in loader)

    return Section([], grown("shuffled epoch", [rows // 100, rows // 10, rows], work))


def encoding(folder: Path, rows: int) -> Section:
    """Activation shards to code shards."""
    shape = SHAPES["small"]
    sae = make_sae(shape, "topk", torch.float32).requires_grad_(False)

    def work(size: int) -> Callable[[], object]:
        place = folder / f"rows-{size}-{shape.d_in}"
        if not place.exists():
            write_rows(place, shape.d_in, size)
        shards = ActivationShards(place)
        numbers = iter(range(10))

        def encode() -> None:
            out = folder / f"encoded-{size}-{next(numbers)}"
            encode_shards(sae, shards, out, batch_rows=BATCH, progress=False)

        return encode

    return Section([], grown("encode", [rows // 100, rows // 10, rows], work))
