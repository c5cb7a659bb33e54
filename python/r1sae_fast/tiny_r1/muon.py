"""The optimiser of TinyR1: Muon on projection matrices, AdamW on the rest, fp32 master weights.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the
nearest orthogonal one, found by a few Newton-Schulz steps. Matrices of one shape go together.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 4
_UPDATE_RMS = 0.2
"""Scales Muon's step to AdamW's typical size (Liu et al. 2025, arXiv:2502.16982)."""


def orthogonalise(matrices: Tensor) -> Tensor:
    """The orthogonal factor of each of [count, rows, columns], roughly, in bfloat16."""
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.transpose(-2, -1)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x if wide else x.transpose(-2, -1)
    return result


class Optimizer:
    """Updates bfloat16 parameters through float32 masters that it keeps.

    Args:
        matrices: name to parameter [rows, columns] or [count, rows, columns], for Muon.
        others: name to parameter, for AdamW (betas 0.9, 0.95).
    """

    def __init__(
        self,
        matrices: dict[str, Tensor],
        others: dict[str, Tensor],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        self.matrices, self.others = matrices, others
        self.momentum, self.weight_decay = momentum, weight_decay
        self.steps = 0
        self.state: dict[str, Tensor] = {}
        for name, parameter in {**matrices, **others}.items():
            self.state[f"master.{name}"] = parameter.detach().float().clone()
        for name, parameter in matrices.items():
            self.state[f"momentum.{name}"] = torch.zeros_like(parameter, dtype=torch.float32)
        for name, parameter in others.items():
            for moment in ("first", "second"):
                self.state[f"{moment}.{name}"] = torch.zeros_like(parameter, dtype=torch.float32)

    @torch.no_grad()
    def step(self, muon_lr: float, adam_lr: float) -> None:
        """Applies the gradients and clears them."""
        self.steps += 1
        self._muon(muon_lr)
        self._adam(adam_lr)
        for name, parameter in {**self.matrices, **self.others}.items():
            parameter.copy_(self.state[f"master.{name}"])
            parameter.grad = None

    def _muon(self, lr: float) -> None:
        groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = defaultdict(list)
        for name, parameter in self.matrices.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            momentum = self.state[f"momentum.{name}"].lerp_(gradient, 1 - self.momentum)
            nesterov = gradient.lerp(momentum, self.momentum)
            # Batches of matrices of equal shape: stacked experts are many matrices already.
            nesterov = nesterov.reshape(-1, *nesterov.shape[-2:])
            groups[tuple(nesterov.shape[-2:])].append((name, nesterov))
        for shape, members in groups.items():
            updates = orthogonalise(torch.cat([update for _, update in members])).float()
            scale = lr * _UPDATE_RMS * max(shape) ** 0.5
            parts = torch.split(updates, [update.shape[0] for _, update in members])
            for (name, _), update in zip(members, parts, strict=True):
                master = self.state[f"master.{name}"]
                master.mul_(1 - lr * self.weight_decay)
                master.add_(update.reshape(master.shape), alpha=-scale)

    def _adam(self, lr: float, eps: float = 1e-8) -> None:
        beta1, beta2 = 0.9, 0.95
        for name, parameter in self.others.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            first = self.state[f"first.{name}"].lerp_(gradient, 1 - beta1)
            second = self.state[f"second.{name}"].lerp_(gradient.square(), 1 - beta2)
            unbiased = second.sqrt() / (1 - beta2**self.steps) ** 0.5
            step = lr / (1 - beta1**self.steps)
            self.state[f"master.{name}"].addcdiv_(first, unbiased + eps, value=-step)
