"""What decides a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

MODES = ("batch_topk", "topk", "matryoshka")
ADAMS = ("dense", "sparse")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that, together with the shards, decides the weights.

    Args:
        d_sae: number of features.
        k: codes kept per row; with batch_topk on average, ``k * rows`` of a batch together.
        mode: "batch_topk" (arXiv:2412.06410), "topk" (arXiv:2406.04093) or "matryoshka"
            (BatchTopK whose first features must do alone, arXiv:2503.17547).
        tied: one matrix encodes and decodes, as in the released R1 SAEs; else the decoder's rows
            are kept at norm 1.
        tokens: rows to train on in all; the shards are gone through again as often as needed.
        batch_size: rows of a step.
        learning_rate: Adam's peak; default ``2e-4 / sqrt(d_sae / 2**14)`` (arXiv:2406.04093) for
            30,000 steps and more, and larger by ``sqrt(30_000 / steps)`` for fewer, up to tenfold:
            a short run has no time for small steps (found on TinyR1's residuals).
        beta1: Adam's decay of the mean gradient.
        beta2: Adam's decay of the mean squared gradient.
        adam: "dense": the moments of a row whose feature has no codes decay and it moves on, as in
            ``torch.optim.Adam``; "sparse" (CPU only): it is left as it is, moments too, as in
            ``torch.optim.SparseAdam``, which saves its share of the memory traffic.
        warmup: share of the steps in which the rate rises linearly.
        decay: share of the steps, at the end, in which it falls linearly to 0.
        gradient_clip: largest norm of all gradients together.
        aux_coefficient: weight of the auxiliary loss, in which dead features explain what the
            others leave over.
        aux_k: features of a row in that loss; default ``d_in / 2``, at least ``k``.
        dead_after_tokens: a feature is dead when it has not fired for so many tokens; default a
            tenth of ``tokens``, from 8 batches to 10 million.
        threshold_decay: of the moving average over steps of the smallest code kept, which becomes
            the SAE's threshold; default such that it looks back over the last twentieth of the
            run, from 10 to 1000 steps.
        outlier_factor: rows whose norm exceeds the median by this factor (attention sinks, the
            first token) are left out, and counted.
        seed: of the initial weights and the order of rows.
        matryoshka_widths: numbers of features that must do alone, rising to ``d_sae``; default a
            16th, an 8th, a quarter and half of ``d_sae``, and all.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    d_sae: int
    k: int
    mode: str = "batch_topk"
    tied: bool = False
    tokens: int = 10_000_000
    batch_size: int = 4096
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    adam: str = "dense"
    warmup: float = 0.05
    decay: float = 0.3
    gradient_clip: float = 1.0
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None
    dead_after_tokens: int | None = None
    threshold_decay: float | None = None
    outlier_factor: float = 10.0
    seed: int = 0
    matryoshka_widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("d_sae", "k", "tokens", "batch_size"):
            _int(name, getattr(self, name), 1)
        for name in ("aux_k", "dead_after_tokens"):
            if getattr(self, name) is not None:
                _int(name, getattr(self, name), 1)
        if self.matryoshka_widths is not None:
            # A file has a list.
            object.__setattr__(self, "matryoshka_widths", _widths(self))
        _int("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; expected less than 2**63")
        if self.k > self.d_sae:
            raise ValueError(
                f"k is {self.k}, more than d_sae = {self.d_sae}; expected at most that"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        if self.adam not in ADAMS:
            raise ValueError(f"adam is {self.adam!r}; expected one of {', '.join(ADAMS)}")
        if self.learning_rate is not None:
            _number("learning_rate", self.learning_rate, 0.0, math.inf)
        for name in ("beta1", "beta2", "threshold_decay"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0.0, math.nextafter(1.0, 0.0))
        for name in ("warmup", "decay"):
            _number(name, getattr(self, name), 0.0, 1.0)
        _number("gradient_clip", self.gradient_clip, math.ulp(0.0), math.inf)
        _number("aux_coefficient", self.aux_coefficient, 0.0, math.inf)
        _number("outlier_factor", self.outlier_factor, 1.0, math.inf)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """``matryoshka_widths`` or its default."""
        if self.matryoshka_widths is not None:
            return self.matryoshka_widths
        return tuple(sorted({-(-self.d_sae // part) for part in (16, 8, 4, 2, 1)}))

    @property
    def steps(self) -> int:
        """Number of optimiser steps: ``tokens`` in batches, rounded up."""
        return -(-self.tokens // self.batch_size)

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate`` or its default."""
        if self.learning_rate is not None:
            return self.learning_rate
        shortness = min(max(1.0, math.sqrt(30_000 / self.steps)), 10.0)
        return 2e-4 / math.sqrt(self.d_sae / 2**14) * shortness

    @property
    def threshold_memory(self) -> float:
        """``threshold_decay`` or its default."""
        if self.threshold_decay is not None:
            return self.threshold_decay
        return 1.0 - 1.0 / min(max(self.steps / 20, 10.0), 1000.0)

    @property
    def dead_tokens(self) -> int:
        """``dead_after_tokens`` or its default."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return min(max(self.tokens // 10, 8 * self.batch_size), 10_000_000)

    def resolved_aux_k(self, d_in: int) -> int:
        """``aux_k`` or its default, for activations of ``d_in`` numbers."""
        return max(self.k, d_in // 2) if self.aux_k is None else self.aux_k

    def rate(self, step: int) -> float:
        """The learning rate of step ``step`` (from 0)."""
        warm = self.steps * self.warmup
        cool = self.steps * self.decay
        rising = (step + 1) / warm if warm else 1.0
        falling = (self.steps - step) / cool if cool else 1.0
        return self.peak_learning_rate * min(1.0, rising, falling)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        widths = self.matryoshka_widths
        return asdict(self) | {"matryoshka_widths": None if widths is None else list(widths)}


def _widths(config: TrainConfig) -> tuple[int, ...]:
    widths = config.matryoshka_widths
    if not isinstance(widths, (list, tuple)):
        raise TypeError(f"matryoshka_widths is {widths!r}; expected a list of ints")
    if config.mode != "matryoshka":
        raise ValueError(
            f'matryoshka_widths is given with mode {config.mode!r}; expected mode "matryoshka"'
        )
    for width in widths:
        _int("a width of matryoshka_widths", width, 1)
    rising = all(low < high for low, high in pairwise(widths))
    if not rising or not widths or widths[-1] != config.d_sae:
        raise ValueError(
            f"matryoshka_widths is {list(widths)}; expected numbers that rise to "
            f"d_sae = {config.d_sae}"
        )
    return tuple(widths)


def _int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an int")
    if value < low:
        raise ValueError(f"{name} is {value}; expected at least {low}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number")
    # Written so that a NaN fails.
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected {low:g} to {high:g}")
