"""Means of a run's figures between two lines of its metrics."""

from __future__ import annotations

import math
import time

from torch import Tensor

from r1sae_fast.train.step import StepFigures


class Averages:
    """Sums of figures since the last line of metrics, on the device they were measured on."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.steps = 0
        self.tokens = 0
        self.dead = 0
        self.sums: dict[str, Tensor | float] = dict.fromkeys(("loss", "aux_loss", "l0"), 0.0)
        self.fvu: Tensor | float = 0.0
        self.losses: dict[int, Tensor] = {}
        """By step."""
        self.varied: Tensor | int = 0
        """Steps that had an FVU."""

    def add(self, figures: StepFigures, tokens: int, step: int) -> None:
        """Counts the step of that number."""
        self.losses[step] = figures.loss + figures.aux_loss
        self.steps += 1
        self.tokens += tokens
        self.dead = figures.dead
        for name in self.sums:
            self.sums[name] = self.sums[name] + getattr(figures, name)
        self.fvu = self.fvu + figures.fvu.nan_to_num(nan=0.0, posinf=math.inf)
        self.varied = self.varied + ~figures.fvu.isnan()

    def means(self) -> dict[str, float]:
        """Of each figure; the FVU over the steps that have one, NaN if none has."""
        means = {name: float(total) / self.steps for name, total in self.sums.items()}
        varied = int(self.varied)
        return means | {"fvu": float(self.fvu) / varied if varied else math.nan}

    def first_not_finite(self, last: int) -> int:
        """The first step with a loss that is NaN or infinite; ``last`` where none has."""
        bad = (step for step, loss in self.losses.items() if not math.isfinite(float(loss)))
        return next(bad, last)

    def is_finite(self) -> bool:
        """Whether every loss since the last line was neither NaN nor infinite."""
        return math.isfinite(float(self.sums["loss"]) + float(self.sums["aux_loss"]))
