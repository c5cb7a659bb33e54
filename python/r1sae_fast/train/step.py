"""One step of training: loss, hand-written sparse gradients, Adam.

The loss is the architecture's (:mod:`r1sae_fast.train.losses`); to it comes, with a small weight,
how badly the dead features explain what the others left over (auxk, arXiv:2406.04093 appendix A.2).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops._memory import copy_on_demand, empty_weights
from r1sae_fast.optim import FactoredGradient, clip_grad_norm_
from r1sae_fast.optim.factored import turning
from r1sae_fast.optim.update import Settings, settle, update
from r1sae_fast.train import by_kernels, factored
from r1sae_fast.train import gradients as dense
from r1sae_fast.train.clock import Clock
from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.directions import first_directions, unit_rows
from r1sae_fast.train.gradients import Auxiliary, Weights
from r1sae_fast.train.losses import LOSSES, Finder, Sae, jumprelu, topk, transcoder
from r1sae_fast.train.mixed import RoundedWeights, WideningFinder
from r1sae_fast.train.parallel import ALONE, Ranks
from r1sae_fast.train.select import DenseFinder, RowByRow
from r1sae_fast.train.sums import squared_deviations


@dataclass(frozen=True)
class StepFigures:
    """What a step measured; tensors, so that an accelerator's queue is not stalled."""

    loss: Tensor
    aux_loss: Tensor
    fvu: Tensor
    """NaN where the rows don't vary."""
    l0: float
    dead: int


_ROWS = 1024

_SHARED = ("b_dec", transcoder.SKIP)
"""Parameters that every process has whole; the others lie with the features."""

_TARGETS = 0x7A6E7
"""Added to the seed for a transcoder's decoder, whose directions are not the encoder's."""


class Learner:
    """The weights, feature by feature, Adam's state, and when each feature last fired.

    ``encoder`` and ``decoder`` are ``[d_sae, d_in]`` (the decoder is absent when tied), so that a
    feature's numbers lie together for the sparse products.

    Args:
        in_factors: whether gradients of matrices are never written out; default on the CPU, where
            alone it is possible.
        by_kernels: whether, if not so, encoding and gradients are the package's sparse operations;
            default on GPUs, where they are Triton's kernels. Else they are plain torch, which is
            the truth for the others.
        transcodes: whether rows have targets.
        ranks: the processes that train it together; of weights and state each has those of its own
            features. All call the same methods with the same rows.
    """

    def __init__(
        self,
        config: TrainConfig,
        d_in: int,
        device: torch.device,
        *,
        in_factors: bool | None = None,
        by_kernels: bool | None = None,
        transcodes: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.in_factors = device.type == "cpu" if in_factors is None else in_factors
        on_gpu = device.type == "cuda"
        self.by_kernels = not self.in_factors and (on_gpu if by_kernels is None else by_kernels)
        if config.compute_dtype == "bfloat16" and not self.in_factors:
            raise ValueError(
                f'compute_dtype is "bfloat16" on {device}; expected "float32" there: computing in '
                "bfloat16 beside float32 weights is for CPUs so far"
            )
        if config.adam == "sparse" and not self.in_factors:
            raise ValueError(f'adam is "sparse" on {device}; expected "dense" there')
        self.config = config
        self.d_in = d_in
        self.device = device
        self.ranks = ranks
        self.clock = Clock()
        self.first, end = ranks.own(config.d_sae)
        self.features = end - self.first
        """Own ones."""
        self.transcodes = transcodes
        directions = first_directions(config.seed, config, d_in, self.first, end).to(device)
        self.parameters: dict[str, Tensor] = {"encoder": directions}
        if transcodes:
            seed = (config.seed + _TARGETS) % 2**63
            others = first_directions(seed, config, d_in, self.first, end)
            self.parameters["decoder"] = others.to(device)
        elif not config.tied:
            decoder = empty_weights(*directions.shape, dtype=torch.float32, device=device)
            self.parameters["decoder"] = decoder.copy_(directions)
        self.parameters["b_enc"] = torch.zeros(self.features, device=device)
        self.parameters["b_dec"] = torch.zeros(d_in, device=device)
        if config.skip_connection:
            self.parameters[transcoder.SKIP] = torch.zeros(d_in, d_in, device=device)
        if config.mode == "jumprelu":
            self.parameters["log_threshold"] = torch.zeros(self.features, device=device)
        self.adam_state: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        """Adam's moments, by parameter; as torch.optim.Adam names them."""
        self._torch_adam = None if self.in_factors else self._make_torch_adam()
        self.rounded = None
        """What steps compute with, where that is not float32."""
        if config.compute_dtype == "bfloat16":
            self.rounded = RoundedWeights(self.parameters)
        self.screen = ops.Screen(*self._encoder_in_use(), rows=config.batch_size)
        """Finds codes, unless all is plain torch."""
        self.unfired_tokens = torch.zeros(self.features, dtype=torch.int64, device=device)
        """Tokens since each feature last fired."""
        self.threshold = 0.0
        """Moving average of the smallest code kept, in standardised units."""
        self.threshold_weight = 0.0
        self.l0 = 0.0
        """Codes a row in the last step."""
        self.found = config.d_sae / 2 if config.mode == "relu" else 0.0
        """Pre-activations a row that the last step looked at; decides how the next one does it."""

    def start(self, x: Tensor) -> None:
        """Fits to rows ``x [n, d_in]`` what no seed can tell, before the first step."""
        if self.config.mode == "jumprelu":
            least = self.ranks.least
            first = jumprelu.first_log_threshold(self.sae(), x, self.config, least)
            self.parameters["log_threshold"].fill_(first)
        elif not (self.config.penalised or self.config.tied or self.transcodes):
            self._fit_encoder(x)

    @torch.no_grad()
    def _fit_encoder(self, x: Tensor) -> None:
        """Scales the encoder such that the first codes explain the rows best: of norm 1 as the
        decoder it makes them too large (arXiv:2406.04093, A.1, has norms match instead)."""
        sae = self.sae(self.config.row_by_row(0))
        made = sae.decode(topk.find(sae, x, self.config))
        # Each code is what its direction has of x, so the numerator is no less than 0.
        scale = float((made * x).sum() / made.square().sum())
        if 0.0 < scale < math.inf:
            self.parameters["encoder"].mul_(scale)
            self.weights_changed(None, None)

    @property
    def decoder(self) -> Tensor:
        """``[d_sae, d_in]``: the encoder when tied."""
        return self.parameters.get("decoder", self.parameters["encoder"])

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        learning_rate: float,
        sparsity: float = 1.0,
        target: Tensor | None = None,
        *,
        row_by_row: bool = False,
    ) -> StepFigures:
        """Learns from standardised rows ``x [n, d_in]``, n at least 1.

        Args:
            sparsity: share of the sparsity loss that is in force, where there is one.
            target: ``[n, d_in]`` standardised, what a transcoder is to make of x.
            row_by_row: whether each row has its own k codes, even where rows share them.
        """
        figures, gradients = self.gradients(x, sparsity, target, row_by_row=row_by_row)
        plain: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            if isinstance(gradient, FactoredGradient):
                # Where clipping and Adam look for it: torch's .grad takes tensors only.
                self.parameters[name].factored_grad = gradient  # type: ignore[attr-defined]
            else:
                plain[name] = self.parameters[name].grad = gradient
        if self._torch_adam is None:
            self._factored_update(learning_rate)
        else:
            self._dense_update(self._torch_adam, plain, learning_rate)
        self.clock.lap("optimizer")
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.factored_grad = None  # type: ignore[attr-defined]
        return figures

    def _factored_update(self, learning_rate: float) -> None:
        config = self.config
        unit_rows = [] if config.tied else [self.decoder]
        clip_grad_norm_(
            self.parameters.values(),
            config.gradient_clip,
            unit_rows=unit_rows,
            total=self.ranks.total,
            shared=[self.parameters[name] for name in _SHARED if name in self.parameters],
        )
        with self._follower() as follower:
            # The encoder last: who follows it takes the biases as they will be.
            for name in sorted(self.parameters, key="encoder".__eq__):
                settings = Settings(
                    learning_rate,
                    betas=config.betas,
                    untouched="decay" if config.adam == "dense" else "freeze",
                    unit_rows=name == "decoder",
                )
                parameter = self.parameters[name]
                before = parameter.clone() if name == "b_enc" else None
                update(
                    parameter,
                    self.adam_state[name],
                    settings,
                    follower if name == "encoder" else None,
                )
                if before is not None:
                    moved = parameter != before
        rows = {name: self._moved_rows(name) for name in ("encoder", "decoder")}
        if follower is not None and follower.followed:
            return
        in_encoder = rows["encoder"]
        if in_encoder is not None:
            in_encoder = in_encoder | moved
        self.weights_changed(in_encoder, rows["decoder"])

    def _follower(self) -> AbstractContextManager[ops.screen.Follower | None]:
        """The screen, where Adam's weights are those that it is of."""
        return nullcontext() if self.rounded is not None else self.screen.following()

    def _moved_rows(self, name: str) -> Tensor | None:
        """Rows that the last update may have changed, ``[features]`` bool; None for any."""
        asleep = self.adam_state.get(name, {}).get("asleep")
        if asleep is None or self.config.adam != "dense":
            return None
        return asleep <= 0

    def weights_changed(self, in_encoder: Tensor | None, in_decoder: Tensor | None) -> None:
        """Brings copies of the weights up to date.

        Args:
            in_encoder: which features' encoder rows or biases changed, ``[features]`` bool; None:
                any may have.
            in_decoder: likewise of the decoder's rows.
        """
        if self.rounded is not None:
            self.rounded.refresh({"encoder": in_encoder, "decoder": in_decoder})
        self.screen.refresh(None if in_encoder is None else in_encoder.nonzero().flatten())

    def _make_torch_adam(self) -> torch.optim.Optimizer:
        rate, betas = self.config.peak_learning_rate, self.config.betas
        parameters = list(self.parameters.values())
        adam = torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True)
        for name, parameter in self.parameters.items():
            adam.state[parameter] = self.adam_state[name]
        return adam

    def _dense_update(
        self, adam: torch.optim.Optimizer, gradients: dict[str, Tensor], learning_rate: float
    ) -> None:
        if not self.config.tied:
            # Only what turns a decoder row counts: its length is 1 and stays so.
            gradients["decoder"] = turning(gradients["decoder"], self.decoder)
        own = [part.norm() for name, part in gradients.items() if name not in _SHARED]
        whole = [part.norm() for name, part in gradients.items() if name in _SHARED]
        squared = self.ranks.total(torch.stack(own).square().sum())
        norm = (squared + torch.stack(whole).square().sum()).sqrt()
        factor = (self.config.gradient_clip / norm.clamp_min(1e-30)).clamp_max(1.0)
        for name, part in gradients.items():
            self.parameters[name].grad = part.mul_(factor)
        for group in adam.param_groups:
            group["lr"] = learning_rate
        adam.step()
        if not self.config.tied:
            unit_rows(self.decoder)

    @torch.no_grad()
    def gradients(
        self,
        x: Tensor,
        sparsity: float = 1.0,
        target: Tensor | None = None,
        *,
        row_by_row: bool = False,
    ) -> tuple[StepFigures, dict[str, Tensor | FactoredGradient]]:
        """Figures, and the gradient of each parameter by its name; counts what fired."""
        config = self.config
        sae = self.sae(row_by_row)
        forward = LOSSES[config.mode].forward(sae, x, config, sparsity, target)
        self.found = self.ranks.total(forward.found) / x.shape[0]
        codes, error = forward.fired, forward.error
        self.unfired_tokens += x.shape[0]
        self.unfired_tokens[codes.indices.long()] = 0
        dead = (self.unfired_tokens >= config.dead_tokens).nonzero().flatten()
        dead_count = int(self.ranks.total(dead.numel()))
        auxiliary = None
        if dead_count and config.aux_coefficient:
            k = min(config.resolved_aux_k(self.d_in), dead_count)
            auxiliary = Auxiliary(dead, k, config.aux_coefficient, self.ranks)
        if not config.penalised:
            self._follow_threshold(codes.values)

        self.clock.lap("forward")
        scale = 2.0 / error.numel()
        differentiate = (
            factored.gradients
            if self.in_factors
            else by_kernels.gradients
            if self.by_kernels
            else dense.gradients
        )
        gradients, aux_loss = differentiate(
            forward.parts, x, self._weights(), error, scale, auxiliary
        )
        found: dict[str, Tensor | FactoredGradient] = {"encoder": gradients.encoder}
        if not config.tied:
            found["decoder"] = gradients.decoder
        found |= {"b_enc": gradients.b_enc, "b_dec": forward.of_b_dec.sum(0).mul_(scale)}
        if config.skip_connection:
            found[transcoder.SKIP] = transcoder.gradient_of_skip(forward.of_b_dec, x, scale)
        if config.mode == "jumprelu":
            found["log_threshold"] = jumprelu.gradient_of_log_threshold(
                sae, forward, gradients.of_values, config, sparsity
            )
        variance = squared_deviations(x if target is None else target)
        # A batch that doesn't vary (a single row, say) has no fraction of variance.
        fvu = torch.where(variance > 0, forward.squared / variance, math.nan)
        self.l0 = self.ranks.total(codes.nnz) / x.shape[0]
        self.clock.lap("backward")
        return StepFigures(forward.loss, aux_loss, fvu, self.l0, dead_count), found

    def _weights(self) -> Weights:
        rounded = None if self.rounded is None else self.rounded.decoder
        return Weights(self.parameters["encoder"], self.decoder, self.parameters["b_enc"], rounded)

    def sae(self, row_by_row: bool = False) -> Sae:
        """As losses see it."""
        find = self.ranks.finder(self._finder(), self.features)
        if row_by_row:
            find = RowByRow(find)
        return Sae(self.parameters, find, self._decode, self.ranks.total, self.first)

    def _finder(self) -> Finder:
        # A screen computes what it can't exclude one by one.
        many = self.config.penalised and self.found > dense.DENSE_SHARE * self.config.d_sae
        finder: Finder = self.screen
        if many or not (self.in_factors or self.by_kernels):
            finder = DenseFinder(*self._encoder_in_use())
        return finder if self.rounded is None else WideningFinder(finder)

    def _encoder_in_use(self) -> tuple[Tensor, Tensor]:
        """The encoder and b_enc that codes are found with."""
        if self.rounded is not None:
            return self.rounded.encoder, self.rounded.b_enc
        return self.parameters["encoder"], self.parameters["b_enc"]

    def _decode(self, codes: SparseCodes) -> Tensor:
        return self.ranks.decoded(self._decode_own, codes)

    def _decode_own(self, codes: SparseCodes) -> Tensor:
        if dense.is_dense(codes):
            return codes.to_dense() @ self.decoder
        if self.rounded is not None:
            return ops.decode(codes, self.rounded.decoder)
        if self.in_factors or self.by_kernels:
            return ops.decode(codes, self.decoder)
        return dense.decode(codes, self.decoder)

    def _follow_threshold(self, values: Tensor) -> None:
        smallest = self.ranks.least(float(values.min()) if values.numel() else math.inf)
        if smallest == math.inf:
            return
        decay = self.config.threshold_memory
        # Divided by its own weight when read, as Adam's averages are, so the start is not 0.
        self.threshold = decay * self.threshold + (1.0 - decay) * smallest
        self.threshold_weight = decay * self.threshold_weight + (1.0 - decay)

    @property
    def mean_threshold(self) -> float | None:
        """The smallest code kept, averaged over the last steps; None before the first, and where
        another threshold is trained, or none."""
        return self.threshold / self.threshold_weight if self.threshold_weight else None

    def is_finite(self) -> bool:
        """Whether no own weight is NaN or infinite."""
        # Some at a time: the answer takes as much memory as the question.
        parts = (part for tensor in self.parameters.values() for part in torch.split(tensor, _ROWS))
        return all(bool(part.isfinite().all()) for part in parts)

    # -- what a checkpoint keeps --------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All state that is tensors, by name; not copied."""
        state: dict[str, Tensor] = dict(self.parameters)
        for name in self.parameters:
            for part, tensor in self.adam_state[name].items():
                state[f"adam.{name}.{part}"] = tensor
        state["unfired_tokens"] = self.unfired_tokens
        return state

    def wake_vectors(self) -> None:
        """Where features are split: to Adam a vector is one row, so that each rank's may sleep on
        its own; a checkpoint, which has one entry for all, can't tell. Awake, they are the same."""
        if self.ranks.own(self.config.d_sae) == (0, self.config.d_sae):
            return
        for name, parameter in self.parameters.items():
            state = self.adam_state[name]
            # The shared ones are trained alike by all.
            if parameter.dim() == 1 and name not in _SHARED and "asleep" in state:
                settle(state, self.config.betas)
                state["asleep"].zero_()

    def load_tensors(self, state: dict[str, Tensor], *, take: bool = False) -> None:
        """Takes what :meth:`tensors` gave.

        Args:
            take: they are nobody else's: ``state`` is emptied, and moments become the learner's own
                without a copy, of which there would be no room at a size that just fits.
        """
        if not take:
            state = dict(state)
        for name, parameter in self.parameters.items():
            parameter.copy_(state.pop(name))
            prefix = f"adam.{name}."
            parts: dict[str, Tensor] = {}
            for key in [key for key in state if key.startswith(prefix)]:
                tensor = state.pop(key)
                parts[key.removeprefix(prefix)] = tensor if take else copy_on_demand(tensor)
            if not self.in_factors and "asleep" in parts:  # torch's Adam knows of no sleep
                settle(parts, self.config.betas)
                del parts["asleep"], parts["least_rate"]
            # In place: torch's Adam, where it is used, holds the same dict.
            self.adam_state[name].clear()
            self.adam_state[name].update(parts)
        self.unfired_tokens.copy_(state.pop("unfired_tokens"))
        self.weights_changed(None, None)

    def forget_moments(self) -> None:
        """Gives Adam's memory back: after the last step."""
        for state in self.adam_state.values():
            state.clear()
