"""A training run in its folder: what it keeps, and the steps it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r1sae_fast.errors import TrainingDivergedError
from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import PairedShards
from r1sae_fast.shards.loader import ShardLoader
from r1sae_fast.train import checkpoint
from r1sae_fast.train.averages import Averages
from r1sae_fast.train.blame import rows_of
from r1sae_fast.train.checkpoint import Checkpoint, Counters
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.engine_rows import EngineRows
from r1sae_fast.train.export import as_sae, thresholds
from r1sae_fast.train.lockstep import lockstep
from r1sae_fast.train.metrics import Metrics, MetricsFile
from r1sae_fast.train.mixing import MixingLoader
from r1sae_fast.train.parallel import ALONE, Ranks
from r1sae_fast.train.resample import resample
from r1sae_fast.train.standardise import Rows, Source, Standardisation, draw
from r1sae_fast.train.step import Learner

__all__ = ["Run"]

_FIRST_ROWS = 1024
"""From so many a learner takes what it has to begin with."""


class Run:
    """A run in a folder that is locked, new or taken up from its checkpoint.

    All ``ranks`` make the same calls; the first one writes. ``like`` is another run on the same
    rows in the same order: what was measured for it, and its loader, serve this one as well.
    """

    def __init__(
        self,
        shards: Source,
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
        self.readers: Ranks = ALONE if isinstance(shards, EngineRows) else ranks
        """Who has read what of a batch: an engine's rows are with all ranks already."""
        self.transcodes = isinstance(shards, PairedShards)
        """Whether rows have targets."""
        _check_transcoder(config, self.transcodes)
        self.identity: dict[str, Any] = {
            **config.to_dict(),
            "shards": shards.fingerprint,
            "d_in": shards.d_in,
        }
        if isinstance(shards, EngineRows):
            shards.share(ranks if like is None else like.ranks)
        saved = Checkpoint.read(folder, ranks)
        if saved is not None and not resume:
            raise FileExistsError(
                f"{folder}: holds a run already; give another folder, or resume=True to go on"
            )
        if saved is not None:
            identity = _of_before(config) | saved.identity
            if config.beta2 is None and identity.get("beta2") == config.betas[1]:
                identity["beta2"] = None  # once the default was a number
            checkpoint.require_same(folder / checkpoint.FILE, identity, self.identity)
            at = saved.counters
            aim = saved.target_centre
            if aim is not None:
                target = Standardisation(aim, at.target_scale, at.target_norm_limit)
            self.standardisation = Standardisation(
                saved.centre, at.scale, at.norm_limit, None if aim is None else target
            )
        else:
            self.standardisation = self._measured() if like is None else like.standardisation
        self.learner = Learner(config, shards.d_in, device, ranks=ranks, transcodes=self.transcodes)
        self.clock = self.learner.clock
        if saved is None:
            rows = draw(shards, _FIRST_ROWS, config.order_seed)
            self.learner.start(self.standardisation.apply(rows, device).x)
        # An engine makes as many rows as are asked for.
        batch_size = config.batch_size
        if not isinstance(shards, EngineRows):
            batch_size = min(batch_size, len(shards))
        self.loader: ShardLoader | MixingLoader = shards.loader(
            batch_size,
            seed=config.order_seed,
            drop_last=True,
            epochs=None,
            pin_memory=device.type == "cuda",
            part=self.readers.part,
        )
        known = self.standardisation
        self.counters = Counters(scale=known.scale, norm_limit=known.norm_limit)
        if known.target is not None:
            self.counters.target_scale = known.target.scale
            self.counters.target_norm_limit = known.target.norm_limit
        if saved is not None:
            self.counters = saved.counters
            if isinstance(self.loader, MixingLoader):
                self.loader.load_state_dict(saved.loader, folder)
            else:
                self.loader.load_state_dict(saved.loader)
            self.learner.load_tensors(saved.tensors, take=True)
            self.learner.threshold = saved.counters.threshold
            self.learner.threshold_weight = saved.counters.threshold_weight
            self.learner.l0, self.learner.found = saved.counters.l0, saved.counters.found
        if isinstance(self.loader, MixingLoader) and ranks.is_first:
            # What a run wrote that was killed before its checkpoint, or another run's.
            self.loader.drop_other_buffers(folder)

    def _measured(self) -> Standardisation:
        """What the first rank finds: another kind of CPU might round otherwise."""
        shards, config = self.shards, self.config
        many = 2 if self.transcodes else 1
        found = torch.zeros(many, shards.d_in + 2, dtype=torch.float64)
        # An engine's rows are made by all ranks together.
        if self.ranks.is_first or isinstance(shards, EngineRows):
            measured = Standardisation.of(
                shards, outlier_factor=config.outlier_factor, seed=config.order_seed
            )
            for line, one in zip(found, (measured, measured.target), strict=False):
                assert one is not None
                line[:-2] = one.centre
                line[-2:] = torch.tensor([one.scale, one.norm_limit], dtype=torch.float64)
        found = self.ranks.from_first(found)
        read = [
            Standardisation(line[:-2].float(), float(line[-2]), float(line[-1])) for line in found
        ]
        return replace(read[0], target=read[1] if self.transcodes else None)

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
        if isinstance(self.loader, MixingLoader) and self.ranks.is_first:
            self.loader.save_buffer(self.folder)
        Checkpoint(
            self.identity,
            self.counters,
            self.loader.state_dict(),
            self.standardisation.centre,
            self.learner.tensors(),
            None if (target := self.standardisation.target) is None else target.centre,
        ).write(self.folder, self.ranks)
        if isinstance(self.loader, MixingLoader) and self.ranks.is_first:
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
    ) -> Generator[None, tuple[Rows, bool], None]:
        """Takes a step with each ``(standardised rows, whether to stop)`` that it is sent; ends
        after the last one, or when it is to stop, with all saved.

        Raises:
            TrainingDivergedError: the loss became NaN or infinite.
        """
        counters, config = self.counters, self.config
        first = self.ranks.is_first
        log = MetricsFile(self.folder, counters.step) if first else None
        averages = Averages()
        self.clock.restart()
        saved = time.monotonic()
        stop = False
        while counters.step < config.steps and not stop:
            rows, stop = yield
            x = rows.x
            self.clock.lap()
            rate = config.rate(counters.step)
            share = config.sparsity_share(counters.step)
            alone = config.row_by_row(counters.step)
            figures = None
            if x.shape[0]:
                figures = self.learner.step(x, rate, share, rows.target, row_by_row=alone)
            counters.step += 1
            counters.tokens += x.shape[0]
            counters.left_out += rows.left_out
            if figures is not None:
                averages.add(figures, x.shape[0], counters.step)
            self._resample(rows)
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
                at = averages.first_not_finite(counters.step)
                raise TrainingDivergedError(
                    f"loss or weights are not finite at step {at}, which took "
                    f"{rows_of(self.loader, at)}; the last checkpoint in {self.folder} was kept: "
                    "look at these rows and those of the step before, or lower the learning rate "
                    "and train into another folder"
                )
            if averages.tokens:
                line = self._metrics(averages, rate)
                averages = Averages()
                self.clock.restart()
                if log is not None:
                    log.append(line)
                for tell in on_metrics:
                    tell(line)
            if due:
                self.save()
                saved = time.monotonic()

    @torch.no_grad()
    def _resample(self, rows: Rows) -> None:
        """Where the rows of the last step have made one more multiple of ``resample_every``."""
        every, x = self.config.resample_every, rows.x
        if every is not None and x.shape[0]:
            number = self.counters.tokens // every
            if number > (self.counters.tokens - x.shape[0]) // every:
                resample(self.learner, x, number, rows.target)

    def _metrics(self, averages: Averages, rate: float) -> Metrics:
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
        found = thresholds(self.learner, self.learner.parameters, self.standardisation)
        if found.dim() == 0:
            return float(found)
        return self.ranks.total(float(found.double().sum())) / self.config.d_sae

    def sae(self) -> FastSAE:
        """The SAE as it stands, for raw activations, on the CPU in float32.

        Where features are split among ranks, as it was saved last.
        """
        config, learner = self.config, self.learner
        weights = {name: tensor.detach().cpu() for name, tensor in learner.parameters.items()}
        if learner.features < config.d_sae:
            saved = Checkpoint.read(self.folder, only=weights)
            if saved is None:
                raise FileNotFoundError(f"{self.folder / checkpoint.FILE}: nothing was saved yet")
            weights = saved.tensors
        sae = as_sae(learner, weights, self.standardisation)
        sae.metadata = {
            "training": config.to_dict(),
            "tokens": self.counters.tokens,
            "left_out": self.counters.left_out,
            "norm_limit": self.standardisation.norm_limit,
            "activations": self.shards.metadata,
            "activations_fingerprint": self.shards.fingerprint,
        }
        if isinstance(self.shards, PairedShards) and self.standardisation.target is not None:
            sae.metadata["target_norm_limit"] = self.standardisation.target.norm_limit
            sae.metadata["targets"] = self.shards.targets.metadata
            sae.metadata["activations_fingerprint"] = self.shards.inputs.fingerprint
            sae.metadata["targets_fingerprint"] = self.shards.targets.fingerprint
        return sae


def _check_transcoder(config: TrainConfig, transcodes: bool) -> None:
    """Refuses settings that only the other kind has."""
    if config.skip_connection and not transcodes:
        raise ValueError(
            "skip_connection is True without targets: what an autoencoder reads is what it is to "
            "make; give targets (a transcoder), or leave skip_connection out"
        )
    if config.tied and transcodes:
        raise ValueError(
            "tied is True with targets: a transcoder reads one activation and makes another, so "
            "encoder and decoder can't be one matrix; leave tied out"
        )


def _of_before(config: TrainConfig) -> dict[str, Any]:
    """What a run had for ``config`` before there was a choice."""
    shared = 0.0 if config.row_by_row(0) else config.topk_warmup
    before = {"adam": "dense", "compute_dtype": "float32", "skip_connection": False}
    return {**before, "topk_warmup": shared}
