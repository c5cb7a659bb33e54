"""TinyR1's residuals after one block: what all train on, and others that none has seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from r1sae_fast.demo.traces import written
from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train.standardise import checked, norm_limit, sample

LAYER = 2
SLIP_RATE = 0.25
HELD_OUT_TOKENS = 65_536
CE_TRACES = 128


def engine() -> LocalEngine:
    """TinyR1 in bfloat16, as a harvest runs it."""
    return LocalEngine.from_pretrained("tiny-r1", dtype=torch.bfloat16)


def prepare(folder: Path, tokens: int) -> tuple[ActivationShards, ActivationShards]:
    """The shards to train on (``tokens`` rows and a few) and held-out ones; resumed where left."""
    found = []
    for name, held_out, rows in (
        (f"train-{tokens}", False, tokens),
        ("held-out", True, HELD_OUT_TOKENS),
    ):
        if not (folder / name / "done").exists():
            model = engine()
            texts = written(model, held_out=held_out, seed=0, slip_rate=SLIP_RATE)
            harvest(
                model, texts, LAYER, folder / name / "shards", mode="prefill", token_budget=rows
            )
            (folder / name / "done").touch()
        found.append(ActivationShards(folder / name / "shards"))
    return found[0], found[1]


def held_out_texts(model: LocalEngine) -> list[list[int]]:
    """Traces of held-out problems, for the cross-entropy."""
    return list(islice(written(model, held_out=True, seed=1, slip_rate=SLIP_RATE), CE_TRACES))


@dataclass(frozen=True)
class Task:
    """What every contender is given."""

    shards: ActivationShards
    folder: Path
    """Its own, for what it writes."""
    d_sae: int
    k: int
    steps: int
    batch_size: int
    seed: int

    @property
    def d_in(self) -> int:
        """Width of the rows."""
        return self.shards.d_in

    @property
    def tokens(self) -> int:
        """Rows trained on."""
        return self.steps * self.batch_size


class Batches:
    """The batches of our trainer, for the others: float32 rows, outliers left out, on each
    iteration from the first."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._limit = norm_limit(sample(task.shards, task.seed), 10.0)

    def __iter__(self) -> Iterator[Tensor]:
        task = self._task
        loader = task.shards.loader(task.batch_size, seed=task.seed, drop_last=True, epochs=None)
        for batch in loader:
            rows, norms = checked(batch)
            keep = norms <= self._limit
            yield rows if bool(keep.all()) else rows[keep]
