"""Cross-entropy and divergence of a model's predictions, in float64, a few tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_NUMBERS = 1 << 22


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p(target)`` in nats, float64 ``[n]``, of logits ``[n, vocab]``."""
    found = []
    for part, wanted in _chunks(logits, targets):
        log_p = part.double().log_softmax(1)
        found.append(-log_p.gather(1, wanted[:, None]).squeeze(1))
    return torch.cat(found) if found else logits.new_empty(0, dtype=torch.float64)


def divergences(clean: Tensor, disturbed: Tensor) -> Tensor:
    """``KL(clean || disturbed)`` in nats, float64 ``[n]``, of two logits ``[n, vocab]``."""
    found = []
    for part, other in _chunks(clean, disturbed):
        log_p, log_q = part.double().log_softmax(1), other.double().log_softmax(1)
        # p log p is 0 where p is: a logit of -inf stands for an impossible token.
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        found.append(terms.sum(1))
    return torch.cat(found) if found else clean.new_empty(0, dtype=torch.float64)


def _chunks(rows: Tensor, others: Tensor) -> list[tuple[Tensor, Tensor]]:
    step = max(1, _CHUNK_NUMBERS // rows.shape[1])
    return (
        list(zip(torch.split(rows, step), torch.split(others, step), strict=True))
        if len(rows)
        else []
    )
