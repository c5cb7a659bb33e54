"""What decides a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

MODES = ("batch_topk", "topk", "matryoshka", "jumprelu", "relu")
SPARSITIES = ("target", "l0", "tanh")
ADAMS = ("dense", "sparse")
COMPUTE_DTYPES = ("float32", "bfloat16")
_PENALISED = ("jumprelu", "relu")
_SHARED_CODES = ("batch_topk", "matryoshka")
_BELONGS = {
    ("matryoshka_widths",): ("matryoshka",),
    ("sparsity_loss", "bandwidth", "tanh_scale"): ("jumprelu",),
    ("sparsity_coefficient", "sparsity_warmup"): _PENALISED,
    ("threshold_decay",): ("batch_topk", "topk", "matryoshka"),
    ("topk_warmup",): _SHARED_CODES,
}
"""Settings that only some architectures know: who gives them to another one expects too much."""
_COEFFICIENTS = {"target": 1.0, "l0": 0.001, "tanh": 0.001, "relu": 0.08}
_BANDWIDTH = 0.05


@dataclass(frozen=True)
class TrainConfig:
    """Everything that, together with the shards, decides the weights.

    Args:
        d_sae: number of features.
        k: codes kept per row; with batch_topk and matryoshka on average, ``k * rows`` of a batch
            together; with jumprelu the mean that its loss aims at. Not given with relu, nor with
            jumprelu's other losses: there the penalty decides.
        mode: "batch_topk" (arXiv:2412.06410), "topk" (arXiv:2406.04093), "matryoshka" (BatchTopK
            whose first features must do alone, arXiv:2503.17547), "jumprelu" (a learned threshold
            a feature, arXiv:2407.14435) or "relu" (with an L1 penalty, the baseline).
        tied: one matrix encodes and decodes, as in the released R1 SAEs; else the decoder's rows
            are kept at norm 1.
        tokens: rows to train on in all; the shards are gone through again as often as needed.
        batch_size: rows of a step.
        learning_rate: Adam's peak; default ``2e-4 / sqrt(d_sae / 2**14)`` (arXiv:2406.04093) for
            30,000 steps and more, and larger by ``(30_000 / steps) ** 0.7`` for fewer, up to
            20-fold (with jumprelu and relu the square root, up to tenfold): a short run has no
            time for small steps (found on TinyR1's residuals).
        beta1: Adam's decay of the mean gradient.
        beta2: Adam's decay of the mean squared gradient; default such that it looks back over a
            tenth of the run, from 100 to 1000 steps (0.99 to 0.999; with jumprelu and relu 0.999):
            longer, and the large gradients of the first steps would hold a short run back.
        adam: "dense": the moments of a row whose feature has no codes decay and it moves on, as in
            ``torch.optim.Adam``; "sparse" (CPU only): it is left as it is, moments too, as in
            ``torch.optim.SparseAdam``, which saves its share of the memory traffic.
        compute_dtype: "float32", or "bfloat16" (CPU only): codes, what they decode to and the
            gradients are computed with weights rounded to bfloat16; what Adam moves, the checkpoint
            and the finished SAE stay float32 (see :mod:`r1sae_fast.train.mixed`).
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
        skip_connection: a transcoder (which reads one activation and makes another) also has a
            matrix from its input straight to its output (arXiv:2501.18823).
        topk_warmup: of batch_topk and matryoshka: share of the steps, at the start, in which each
            row has its own k codes. Pre-activations of features that still point anywhere grow
            with a row's norm, so that the largest rows would take nearly all codes; default 0.3,
            and 0 in runs of less than 400 steps, which have no time to get used to the change.
        outlier_factor: rows whose norm exceeds the median by this factor (attention sinks, the
            first token) are left out, and counted.
        seed: of the initial weights and the order of rows.
        data_seed: of the order of rows and of the sample that they are centred and scaled by;
            default ``seed``. SAEs of different seeds that share one pass over the data (a sweep)
            have the same.
        resample_every: reset dead features to directions of badly explained rows every so many
            tokens (Bricken et al., 2023); default never: the auxiliary loss usually revives them.
        matryoshka_widths: numbers of features that must do alone, rising to ``d_sae``; default a
            16th, an 8th, a quarter and half of ``d_sae``, and all.
        sparsity_loss: of jumprelu: "target", the squared relative distance of the mean number of
            codes from ``k`` (the default); "l0", that number; "tanh", its smooth twin.
        sparsity_coefficient: of jumprelu and relu: weight of the sparsity loss of a row against its
            squared error, in units in which x has mean norm 1; default 1 for "target", 0.001 for
            "l0" and "tanh", 0.08 for relu (found on TinyR1's residuals). More means fewer codes.
        sparsity_warmup: of jumprelu and relu: share of the steps in which that weight rises
            linearly from 0; default 0.05, for "tanh" 1.
        bandwidth: of jumprelu: width of the kernel by which thresholds learn, in the same units;
            default 0.05, as short runs need (the paper has 0.001 for long ones).
        tanh_scale: of jumprelu's "tanh": by what codes, in the same units, are multiplied in
            it; default 100.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    d_sae: int
    k: int | None = None
    mode: str = "batch_topk"
    tied: bool = False
    skip_connection: bool = False
    tokens: int = 10_000_000
    batch_size: int = 4096
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float | None = None
    adam: str = "dense"
    compute_dtype: str = "float32"
    warmup: float = 0.05
    decay: float = 0.3
    gradient_clip: float = 1.0
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None
    dead_after_tokens: int | None = None
    threshold_decay: float | None = None
    topk_warmup: float | None = None
    outlier_factor: float = 10.0
    seed: int = 0
    data_seed: int | None = None
    resample_every: int | None = None
    matryoshka_widths: tuple[int, ...] | None = None
    sparsity_loss: str | None = None
    sparsity_coefficient: float | None = None
    sparsity_warmup: float | None = None
    bandwidth: float | None = None
    tanh_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("d_sae", "tokens", "batch_size"):
            _int(name, getattr(self, name), 1)
        for name in ("k", "aux_k", "dead_after_tokens", "resample_every"):
            if getattr(self, name) is not None:
                _int(name, getattr(self, name), 1)
        for name in ("seed", "data_seed"):
            if (value := getattr(self, name)) is not None:
                _int(name, value, 0)
                if value >= 2**63:
                    raise ValueError(f"{name} is {value}; expected less than 2**63")
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(
                f"k is {self.k}, more than d_sae = {self.d_sae}; expected at most that"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        for name in ("tied", "skip_connection"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected true or false")
        self._check_architecture()
        if self.adam not in ADAMS:
            raise ValueError(f"adam is {self.adam!r}; expected one of {', '.join(ADAMS)}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype is {self.compute_dtype!r}; expected one of "
                f"{', '.join(COMPUTE_DTYPES)}"
            )
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
        if self.sparsity_coefficient is not None:
            _number("sparsity_coefficient", self.sparsity_coefficient, 0.0, math.inf)
        for name in ("topk_warmup", "sparsity_warmup"):
            if (share := getattr(self, name)) is not None:
                _number(name, share, 0.0, 1.0)
        for name in ("bandwidth", "tanh_scale"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 1e-6, math.inf)

    def _check_architecture(self) -> None:
        """Refuses settings of another architecture, and the lack of those that are needed."""
        for names, modes in _BELONGS.items():
            for name in names:
                if getattr(self, name) is not None and self.mode not in modes:
                    raise ValueError(
                        f"{name} is given with mode {self.mode!r}; it is for {' and '.join(modes)}"
                    )
        if self.mode == "relu" and self.tied:
            raise ValueError(
                'tied is True with mode "relu", which would make codes small by making the one '
                "matrix large; expected an untied SAE, or another mode"
            )
        if self.sparsity_loss is not None and self.sparsity_loss not in SPARSITIES:
            raise ValueError(
                f"sparsity_loss is {self.sparsity_loss!r}; expected one of {', '.join(SPARSITIES)}"
            )
        if self.tanh_scale is not None and self.sparsity != "tanh":
            raise ValueError(f"tanh_scale is given with sparsity_loss {self.sparsity!r}")
        how = self.mode if self.mode != "jumprelu" else f"jumprelu, sparsity_loss {self.sparsity}"
        if self.aims_at_k and self.k is None:
            raise ValueError(f"k is missing: mode {how} needs the number of codes a row")
        if not self.aims_at_k and self.k is not None:
            raise ValueError(
                f"k is {self.k} with mode {how}, in which sparsity_coefficient decides the number "
                "of codes; leave k out"
            )
        if self.matryoshka_widths is not None:
            # A file has a list.
            object.__setattr__(self, "matryoshka_widths", _widths(self))

    @property
    def order_seed(self) -> int:
        """``data_seed`` or its default."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def penalised(self) -> bool:
        """Whether a sparsity loss decides which pre-activations are codes."""
        return self.mode in _PENALISED

    @property
    def first_l0(self) -> int:
        """Codes a row with which jumprelu begins."""
        return min(64, max(1, self.d_sae // 16)) if self.k is None else self.k

    @property
    def aims_at_k(self) -> bool:
        """Whether ``k`` says how many codes there are."""
        return self.mode != "relu" and self.sparsity in (None, "target")

    @property
    def needed_k(self) -> int:
        """``k`` where :attr:`aims_at_k`.

        Raises:
            ValueError: elsewhere.
        """
        if self.k is None:
            raise ValueError(f"no k with mode {self.mode}")
        return self.k

    @property
    def sparsity(self) -> str | None:
        """``sparsity_loss`` or its default; None but for jumprelu."""
        if self.mode != "jumprelu":
            return None
        return "target" if self.sparsity_loss is None else self.sparsity_loss

    @property
    def penalty(self) -> float:
        """``sparsity_coefficient`` or its default."""
        if self.sparsity_coefficient is not None:
            return self.sparsity_coefficient
        return _COEFFICIENTS["relu" if self.sparsity is None else self.sparsity]

    @property
    def width(self) -> float:
        """``bandwidth`` or its default."""
        return _BANDWIDTH if self.bandwidth is None else self.bandwidth

    @property
    def slope(self) -> float:
        """``tanh_scale`` or its default."""
        return 100.0 if self.tanh_scale is None else self.tanh_scale

    def sparsity_share(self, step: int) -> float:
        """How much of the sparsity loss is in force at ``step`` (from 0)."""
        warmup = self.sparsity_warmup
        if warmup is None:
            warmup = 1.0 if self.sparsity == "tanh" else 0.05
        warm = self.steps * warmup
        return min(1.0, (step + 1) / warm) if warm else 1.0

    def row_by_row(self, step: int) -> bool:
        """Whether at ``step`` (from 0) each row has its own k codes, where later a batch shares."""
        share = self.topk_warmup
        if share is None:
            share = 0.3 if self.steps >= 400 else 0.0
        return self.mode in _SHARED_CODES and step < share * self.steps

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
        power, most = (0.5, 10.0) if self.penalised else (0.7, 20.0)
        shortness = min(max(1.0, math.pow(30_000 / self.steps, power)), most)
        return 2e-4 / math.sqrt(self.d_sae / 2**14) * shortness

    @property
    def betas(self) -> tuple[float, float]:
        """``beta1``, and ``beta2`` or its default."""
        if self.beta2 is not None:
            return self.beta1, self.beta2
        memory = 1000.0 if self.penalised else min(max(self.steps / 10, 100.0), 1000.0)
        return self.beta1, 1.0 - 1.0 / memory

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
        return max(self.k or 1, d_in // 2) if self.aux_k is None else self.aux_k

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
