"""One step of training: loss, hand-written sparse gradients, Adam.

The loss is the squared error per activation number; to it comes, with a small weight, how badly
the dead features explain what the others left over (auxk, arXiv:2406.04093 appendix A.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.gradients import backward, decode
from r1sae_fast.train.select import select


@dataclass(frozen=True)
class StepFigures:
    """What a step measured; tensors, so that an accelerator's queue is not stalled."""

    loss: Tensor
    aux_loss: Tensor
    fvu: Tensor
    """NaN where the rows don't vary."""
    l0: float
    dead: int


class Learner:
    """The weights, feature by feature, Adam's state, and when each feature last fired.

    ``encoder`` and ``decoder`` are ``[d_sae, d_in]`` (the decoder is absent when tied), so that a
    feature's numbers lie together for the sparse products.
    """

    def __init__(self, config: TrainConfig, d_in: int, device: torch.device) -> None:
        self.config = config
        self.d_in = d_in
        self.device = device
        # On the CPU whatever the device, so that the seed means the same weights everywhere.
        generator = torch.Generator().manual_seed(config.seed)
        directions = torch.randn(config.d_sae, d_in, generator=generator)
        directions = _unit_rows(directions).to(device)
        self.parameters: dict[str, Tensor] = {"encoder": directions}
        if not config.tied:
            self.parameters["decoder"] = directions.clone()
        self.parameters["b_enc"] = torch.zeros(config.d_sae, device=device)
        self.parameters["b_dec"] = torch.zeros(d_in, device=device)
        self.optimizer = torch.optim.Adam(
            list(self.parameters.values()),
            lr=config.peak_learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.unfired_tokens = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        """Tokens since each feature last fired."""
        self.threshold = 0.0
        """Moving average of the smallest code kept, in standardised units."""
        self.threshold_weight = 0.0

    @property
    def decoder(self) -> Tensor:
        """``[d_sae, d_in]``: the encoder when tied."""
        return self.parameters.get("decoder", self.parameters["encoder"])

    @torch.no_grad()
    def step(self, x: Tensor, learning_rate: float) -> StepFigures:
        """Learns from standardised rows ``x [n, d_in]``, n at least 1."""
        figures, gradients = self.gradients(x)
        if not self.config.tied:
            # Only what turns a decoder row counts: its length is 1 and stays so.
            decoder, gradient = self.parameters["decoder"], gradients["decoder"]
            along = (gradient * decoder).sum(1, keepdim=True)
            gradient.addcmul_(decoder, along, value=-1.0)
        norm = torch.stack([part.norm() for part in gradients.values()]).norm()
        factor = (self.config.gradient_clip / norm.clamp_min(1e-30)).clamp_max(1.0)
        for name, part in gradients.items():
            self.parameters[name].grad = part.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.config.tied:
            _unit_rows(self.parameters["decoder"])
        return figures

    @torch.no_grad()
    def gradients(self, x: Tensor) -> tuple[StepFigures, dict[str, Tensor]]:
        """Figures, and the gradient of each parameter by its name; counts what fired."""
        config, weights = self.config, self.parameters
        pre = torch.addmm(weights["b_enc"], x, weights["encoder"].T)
        codes = select(pre, config.k, config.mode)
        error = decode(codes, self.decoder).add_(weights["b_dec"]).sub_(x)
        squared = error.square().sum()
        loss = squared / error.numel()
        gradient = error * (2.0 / error.numel())
        sparse = backward(codes, x, self.decoder, gradient)

        self.unfired_tokens += x.shape[0]
        self.unfired_tokens[codes.features] = 0
        dead = (self.unfired_tokens >= config.dead_tokens).nonzero().flatten()
        aux_loss = loss.new_zeros(())
        if dead.numel() and config.aux_coefficient:
            aux_loss, of_dead = self._auxiliary(x, pre, error, dead)
            for mine, more in zip(sparse, of_dead, strict=True):
                mine[dead] += config.aux_coefficient * more
        self._follow_threshold(codes.values)

        gradients = {"encoder": sparse.encoder}
        if config.tied:
            sparse.encoder.add_(sparse.decoder)
        else:
            gradients["decoder"] = sparse.decoder
        gradients |= {"b_enc": sparse.b_enc, "b_dec": gradient.sum(0)}
        variance = (x - x.mean(0)).square().sum()
        # A batch that doesn't vary (a single row, say) has no fraction of variance.
        fvu = torch.where(variance > 0, squared / variance, math.nan)
        l0 = codes.values.shape[0] / x.shape[0]
        return StepFigures(loss, aux_loss, fvu, l0, dead.numel()), gradients

    def _auxiliary(
        self, x: Tensor, pre: Tensor, error: Tensor, dead: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """How much of the (constant) leftover the dead features fail to explain, 1 being all of
        it, and the gradients of their weights. b_dec takes no part: it is in the leftover."""
        k = min(self.config.resolved_aux_k(self.d_in), dead.numel())
        codes = select(pre.index_select(1, dead), k, "topk")
        decoder = self.decoder[dead]
        missed = decode(codes, decoder).add_(error)  # error is -(leftover)
        size = error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)
        aux_loss = missed.square().sum() / size
        return aux_loss, tuple(backward(codes, x, decoder, missed.mul_(2.0 / size)))

    def _follow_threshold(self, values: Tensor) -> None:
        if values.numel() == 0:
            return
        decay = self.config.threshold_memory
        # Divided by its own weight when read, as Adam's averages are, so the start is not 0.
        self.threshold = decay * self.threshold + (1.0 - decay) * float(values.min())
        self.threshold_weight = decay * self.threshold_weight + (1.0 - decay)

    @property
    def mean_threshold(self) -> float | None:
        """The smallest code kept, averaged over the last steps; None before the first."""
        return self.threshold / self.threshold_weight if self.threshold_weight else None

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.parameters.values())

    # -- what a checkpoint keeps --------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All state that is tensors, by name; not copied."""
        state: dict[str, Tensor] = dict(self.parameters)
        for name, parameter in self.parameters.items():
            for part, tensor in self.optimizer.state.get(parameter, {}).items():
                state[f"adam.{name}.{part}"] = tensor
        state["unfired_tokens"] = self.unfired_tokens
        return state

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes what :meth:`tensors` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
            prefix = f"adam.{name}."
            parts = {
                key.removeprefix(prefix): tensor.clone()
                for key, tensor in state.items()
                if key.startswith(prefix)
            }
            if parts:
                self.optimizer.state[parameter] = parts
        self.unfired_tokens.copy_(state["unfired_tokens"])


def _unit_rows(matrix: Tensor) -> Tensor:
    """Scales each row to norm 1, in place."""
    return matrix.div_(matrix.norm(dim=1, keepdim=True).clamp_min(1e-12))
