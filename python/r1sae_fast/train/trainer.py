"""Trains an SAE on shards; killed at any point, the same call goes on to the same weights."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.errors import TrainingDivergedError
from r1sae_fast.sae import FastSAE, Mode
from r1sae_fast.shards import ActivationShards
from r1sae_fast.shards.loader import ShardLoader
from r1sae_fast.train import checkpoint, metrics
from r1sae_fast.train.checkpoint import Checkpoint, Counters
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.lockstep import lockstep
from r1sae_fast.train.metrics import Metrics, MetricsFile
from r1sae_fast.train.mixing import FILES, EngineRows, MixingLoader
from r1sae_fast.train.parallel import ALONE, Ranks
from r1sae_fast.train.resample import resample
from r1sae_fast.train.standardise import Standardisation, draw
from r1sae_fast.train.step import Learner, StepFigures


def train(
    shards: ActivationShards | EngineRows,
    out_dir: str | os.PathLike[str],
    config: TrainConfig,
    *,
    resume: bool = True,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 60.0,
    log_every: int | None = None,
    progress: bool | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
) -> FastSAE:
    """Trains an SAE on ``shards`` and saves it in ``out_dir``.

    The folder gets what :meth:`FastSAE.save` writes, ``metrics.jsonl`` and
    ``checkpoint.safetensors``. The SAE takes raw activations (what training did to their centre and
    scale is folded into it) and has a threshold, so that it may be used in mode "threshold" too.
    On the CPU an interrupted run that is resumed gives the same weights to the bit, given as many
    threads. At SIGTERM it saves after the step that it is in, and exits with status 143.

    Args:
        shards: what to train on: rows that were harvested, or an engine's as it makes them.
        out_dir: new, empty, or of a run that is gone on with.
        config: everything that decides the weights.
        resume: go on from the folder's checkpoint (a finished run is just loaded); False refuses a
            folder that has one.
        device: where to train.
        checkpoint_seconds: how often the state is saved.
        log_every: steps between two lines of metrics; default such that there are about 200.
        progress: show a bar on stderr; default if that is a terminal.
        on_metrics: called with each line of metrics.

    Returns:
        The trained SAE on the CPU, float32, in the mode it was trained in.

    Raises:
        FileExistsError: the folder has a checkpoint and ``resume`` is False, or holds other files.
        ValueError: the checkpoint is of other settings or other shards (named); no rows.
        NonFiniteError: a NaN or infinite activation; the row is named.
        TrainingDivergedError: the loss became NaN or infinite; the last checkpoint is kept.
        ShardError: another process trains into the folder.
    """
    folder = Path(out_dir)
    with locked(folder):
        run = Run(shards, folder, config, torch.device(device), resume=resume)
        run.go(
            checkpoint_seconds=checkpoint_seconds,
            log_every=max(1, config.steps // 200) if log_every is None else log_every,
            progress=progress,
            on_metrics=on_metrics,
        )
        sae = run.sae()
        sae.save(folder)
        return sae


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder, made if need be, for one writer at a time.

    Raises:
        FileExistsError, NotADirectoryError: it is something else.
        ShardError: another process trains into it.
    """
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _core.FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


_ENCODES = {"matryoshka": "batch_topk", "jumprelu": "threshold", "relu": "threshold"}
"""In which mode the SAE encodes, where that is not the mode it was trained in."""

_FIRST_ROWS = 1024
"""From so many a learner takes what it has to begin with."""

DIVERGED = "diverged.txt"
"""In the folder of an SAE that a sweep has given up: why."""

_OURS = {".lock", checkpoint.FILE, metrics.FILE, DIVERGED, "sae.safetensors", "config.json"}


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder / checkpoint.FILE).exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder; give a folder for the SAE")
    ours = {*_OURS, *(f"{name}.tmp" for name in _OURS)}
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in ours and not path.match(FILES) and not path.match(f"{FILES}.tmp")
    )
    if foreign:
        raise FileExistsError(
            f"{folder}: not empty and not a training run (it holds {foreign[0]!r}); "
            "give an empty or a new folder"
        )


class Run:
    """A run in a folder that is locked, new or taken up from its checkpoint.

    All ``ranks`` make the same calls; the first one writes. ``like`` is another run on the same
    rows in the same order: what was measured for it, and its loader, serve this one as well.
    """

    def __init__(
        self,
        shards: ActivationShards | EngineRows,
        folder: Path,
        config: TrainConfig,
        device: torch.device,
        *,
        resume: bool,
        ranks: Ranks = ALONE,
        like: Run | None = None,
    ) -> None:
        self.shards, self.folder, self.config, self.device = shards, folder, config, device
        self.ranks = ranks
        if config.resample_every is not None and ranks is not ALONE:
            raise ValueError(
                "resample_every is for one process; leave it out: the auxiliary loss revives dead "
                "features in any number of them"
            )
        self.identity: dict[str, Any] = {
            **config.to_dict(),
            "shards": shards.fingerprint,
            "d_in": shards.d_in,
        }
        saved = Checkpoint.read(folder, ranks)
        if saved is not None and not resume:
            raise FileExistsError(
                f"{folder}: holds a run already; give another folder, or resume=True to go on"
            )
        if saved is not None:
            # A run of before there was a choice.
            identity = {"adam": "dense"} | saved.identity
            checkpoint.require_same(folder / checkpoint.FILE, identity, self.identity)
            at = saved.counters
            self.standardisation = Standardisation(saved.centre, at.scale, at.norm_limit)
        else:
            self.standardisation = self._measured() if like is None else like.standardisation
        self.learner = Learner(config, shards.d_in, device, ranks=ranks)
        self.clock = self.learner.clock
        if saved is None and config.mode == "jumprelu":
            rows = draw(shards, _FIRST_ROWS, config.order_seed)
            self.learner.start(self.standardisation.apply(rows, device)[0])
        # An engine makes as many rows as are asked for.
        batch_size = config.batch_size
        if isinstance(shards, ActivationShards):
            batch_size = min(batch_size, len(shards))
        self.loader: ShardLoader | MixingLoader = shards.loader(
            batch_size,
            seed=config.order_seed,
            drop_last=True,
            epochs=None,
            pin_memory=device.type == "cuda",
            part=ranks.part,
        )
        self.counters = Counters(
            scale=self.standardisation.scale, norm_limit=self.standardisation.norm_limit
        )
        if saved is not None:
            self.counters = saved.counters
            if isinstance(self.loader, MixingLoader):
                self.loader.load_state_dict(saved.loader, folder)
            else:
                self.loader.load_state_dict(saved.loader)
            self.learner.load_tensors(saved.tensors)
            self.learner.threshold = saved.counters.threshold
            self.learner.threshold_weight = saved.counters.threshold_weight
            self.learner.l0, self.learner.found = saved.counters.l0, saved.counters.found
        if isinstance(self.loader, MixingLoader):
            # What a run wrote that was killed before its checkpoint, or another run's.
            self.loader.drop_other_buffers(folder)

    def _measured(self) -> Standardisation:
        """What the first rank finds: another kind of CPU might round otherwise."""
        shards, config = self.shards, self.config
        found = torch.zeros(shards.d_in + 2, dtype=torch.float64)
        if self.ranks.is_first:
            measured = Standardisation.of(
                shards, outlier_factor=config.outlier_factor, seed=config.order_seed
            )
            found[:-2] = measured.centre
            found[-2:] = torch.tensor([measured.scale, measured.norm_limit], dtype=torch.float64)
        found = self.ranks.from_first(found)
        return Standardisation(found[:-2].float(), float(found[-2]), float(found[-1]))

    def save(self) -> None:
        """Writes the checkpoint.

        Raises:
            RuntimeError: ranks that train the same weights have come apart.
        """
        self.ranks.require_equal(self.learner.parameters.values())
        self.learner.wake_vectors()
        self.counters.threshold = self.learner.threshold
        self.counters.threshold_weight = self.learner.threshold_weight
        self.counters.l0, self.counters.found = self.learner.l0, self.learner.found
        if isinstance(self.loader, MixingLoader):
            self.loader.save_buffer(self.folder)
        Checkpoint(
            self.identity,
            self.counters,
            self.loader.state_dict(),
            self.standardisation.centre,
            self.learner.tensors(),
        ).write(self.folder, self.ranks)
        if isinstance(self.loader, MixingLoader):
            self.loader.drop_other_buffers(self.folder)

    def go(
        self,
        *,
        checkpoint_seconds: float,
        log_every: int,
        progress: bool | None,
        on_metrics: Callable[[Metrics], None] | None,
    ) -> None:
        """Takes the steps that are left."""
        diverged = lockstep(
            [self],
            checkpoint_seconds=checkpoint_seconds,
            log_every=log_every,
            progress=progress,
            on_metrics=[on_metrics],
        )
        for error in diverged.values():
            raise error

    def learning(
        self,
        *,
        checkpoint_seconds: float,
        log_every: int,
        on_metrics: Sequence[Callable[[Metrics], None]],
    ) -> Generator[None, tuple[Tensor, int, bool], None]:
        """Takes a step with each ``(standardised rows, rows left out, whether to stop)`` that it
        is sent; ends after the last one, or when it is to stop, with all saved.

        Raises:
            TrainingDivergedError: the loss became NaN or infinite.
        """
        counters, config = self.counters, self.config
        first = self.ranks.is_first
        log = MetricsFile(self.folder, counters.step) if first else None
        averages = _Averages()
        self.clock.restart()
        saved = time.monotonic()
        stop = False
        while counters.step < config.steps and not stop:
            x, left_out, stop = yield
            self.clock.lap()
            rate = config.rate(counters.step)
            share = config.sparsity_share(counters.step)
            figures = self.learner.step(x, rate, share) if x.shape[0] else None
            counters.step += 1
            counters.tokens += x.shape[0]
            counters.left_out += left_out
            if figures is not None:
                averages.add(figures, x.shape[0])
            self._resample(x)
            last = counters.step == config.steps or stop
            # A checkpoint goes with a line, so that a resumed run's means are over the same
            # steps.
            if counters.step % log_every and not last:
                continue
            finite = averages.is_finite() and self.learner.is_finite()
            # The first rank's clock is theirs all.
            late = first and time.monotonic() - saved > checkpoint_seconds
            diverged, due = self.ranks.agree(not finite, last or late)
            if diverged:
                raise TrainingDivergedError(
                    f"loss or weights are not finite by step {counters.step}; the last "
                    f"checkpoint in {self.folder} was kept: lower the learning rate, and train "
                    "into another folder"
                )
            if averages.tokens:
                line = self._metrics(averages, rate)
                averages = _Averages()
                self.clock.restart()
                if log is not None:
                    log.append(line)
                for tell in on_metrics:
                    tell(line)
            if due:
                self.save()
                saved = time.monotonic()

    @torch.no_grad()
    def _resample(self, x: Tensor) -> None:
        """Where the rows of the last step have made one more multiple of ``resample_every``."""
        every = self.config.resample_every
        if every is not None and x.shape[0]:
            number = self.counters.tokens // every
            if number > (self.counters.tokens - x.shape[0]) // every:
                resample(self.learner, x, number)

    def _metrics(self, averages: _Averages, rate: float) -> Metrics:
        means = averages.means()
        return Metrics(
            step=self.counters.step,
            tokens=self.counters.tokens,
            loss=means["loss"],
            aux_loss=means["aux_loss"],
            fvu=means["fvu"],
            l0=means["l0"],
            dead_fraction=averages.dead / self.config.d_sae,
            threshold=self._mean_threshold(),
            learning_rate=rate,
            left_out=self.counters.left_out,
            tokens_per_second=averages.tokens / max(time.monotonic() - averages.started, 1e-9),
            **{f"{part}_share": share for part, share in self.clock.shares().items()},
        )

    def _mean_threshold(self) -> float:
        found = self._threshold(self.learner.parameters)
        if found.dim() == 0:
            return float(found)
        return self.ranks.total(float(found.double().sum())) / self.config.d_sae

    def _threshold(self, parameters: dict[str, Tensor]) -> Tensor:
        """Of the SAE, ``[]``, or one for each of the parameters' features, in the units of raw
        codes; 0 before the first step."""
        learner, scale = self.learner, self.standardisation.scale
        if "log_threshold" in parameters:
            return parameters["log_threshold"].detach().cpu().exp() / scale
        return torch.tensor((learner.mean_threshold or 0.0) / scale)

    def sae(self) -> FastSAE:
        """The SAE as it stands, for raw activations; see :mod:`r1sae_fast.train.standardise`.

        Where features are split among ranks, as it was saved last.
        """
        config, learner = self.config, self.learner
        scale, centre = self.standardisation.scale, self.standardisation.centre
        weights = {name: tensor.detach().cpu() for name, tensor in learner.parameters.items()}
        if learner.features < config.d_sae:
            saved = Checkpoint.read(self.folder, only=weights)
            if saved is None:
                raise FileNotFoundError(f"{self.folder / checkpoint.FILE}: nothing was saved yet")
            weights = saved.tensors
        encoder = weights["encoder"]
        sae = FastSAE(
            self.shards.d_in,
            config.d_sae,
            self._k(),
            cast(Mode, _ENCODES.get(config.mode, config.mode)),
            tied=config.tied,
            dtype=torch.float32,
        )
        with torch.no_grad():
            sae.W_dec.copy_(weights.get("decoder", encoder))
            if not config.tied:
                sae.W_enc.copy_(encoder.T)
            # In float64: centre @ encoder is a sum of large terms that nearly cancel.
            shift = (encoder.double() @ centre.double()).float()
            sae.b_enc.copy_(weights["b_enc"] / scale - shift)
            sae.b_dec.copy_(weights["b_dec"] / scale + centre)
            if config.penalised or learner.mean_threshold is not None:
                sae.threshold = self._threshold(weights)
        sae.metadata = {
            "training": config.to_dict(),
            "tokens": self.counters.tokens,
            "left_out": self.counters.left_out,
            "norm_limit": self.standardisation.norm_limit,
            "activations": self.shards.metadata,
            "activations_fingerprint": self.shards.fingerprint,
        }
        return sae

    def _k(self) -> int:
        """The SAE's k; where a penalty decides about codes, as many as the last batch had."""
        if self.config.k is not None:
            return self.config.k
        return min(max(1, round(self.learner.l0)), self.config.d_sae)


class _Averages:
    """Sums of figures since the last line of metrics, on the device they were measured on."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.steps = 0
        self.tokens = 0
        self.dead = 0
        self.sums: dict[str, Tensor | float] = dict.fromkeys(("loss", "aux_loss", "l0"), 0.0)
        self.fvu: Tensor | float = 0.0
        self.varied: Tensor | int = 0
        """Steps that had an FVU."""

    def add(self, figures: StepFigures, tokens: int) -> None:
        """Counts a step."""
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

    def is_finite(self) -> bool:
        """Whether every loss since the last line was neither NaN nor infinite."""
        return math.isfinite(float(self.sums["loss"]) + float(self.sums["aux_loss"]))
