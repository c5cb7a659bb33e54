"""Choosing the next token: temperature, nucleus (top-p), seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1sae_fast.errors import NonFiniteError

# Draws made ahead of their use, for a call a token and sequence costs more than the number.
_DRAWS = 64
# The nucleus is looked for among so many of the likeliest tokens first: 0.95 of the probability
# seldom needs more, and sorting a vocabulary of 129,280 takes longer than a product with it.
_LIKELY = 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are what DeepSeek recommends for R1.

    Attributes:
        max_new_tokens: at most so many tokens a sequence.
        temperature: of the softmax; 0 is the same as ``greedy``.
        top_p: draw from the smallest set of tokens that together have this probability.
        seed: of all draws.
        greedy: take the likeliest token instead of drawing.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2**63 - 1")


class Sampler:
    """Draws tokens for a batch; every sequence has a random stream of its own.

    The stream is Philox, keyed by (seed, number of the sequence): which tokens a sequence gets
    does not depend on what else is in its batch, nor on the batch's size.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        """Prepares the streams.

        Args:
            sampling: the settings.
            numbers: of the sequences, in the order of the batch.
        """
        self.sampling = sampling
        self.numbers = list(numbers)
        self._streams = [
            np.random.Generator(np.random.Philox(key=[sampling.seed, number])) for number in numbers
        ]

        self._draws = np.empty((len(numbers), 0))

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all sequences but those at these places of the batch."""
        self.numbers = [self.numbers[row] for row in rows]
        self._streams = [self._streams[row] for row in rows]
        self._draws = self._draws[list(rows)]

    def _draw(self, device: torch.device) -> Tensor:
        """The next number of every stream, float64 [batch]."""
        if not self._draws.shape[1]:
            self._draws = np.array([stream.random(_DRAWS) for stream in self._streams])
        column, self._draws = self._draws[:, 0], self._draws[:, 1:]
        return torch.from_numpy(column.copy()).to(device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Next token ids int64 [batch] from logits [batch, vocab], in the batch's order.

        Raises:
            NonFiniteError: a sequence's logits hold a NaN or an infinity.
        """
        finite = torch.isfinite(logits).all(-1)
        if not finite.all():
            number = self.numbers[int((~finite).nonzero()[0])]
            raise NonFiniteError(
                f"the logits of sequence {number} hold a NaN or an infinity; the checkpoint is "
                "damaged, or its numbers leave the range of this dtype: try float32"
            )
        if self.sampling.greedy or self.sampling.temperature == 0:
            return logits.argmax(-1)
        draws = self._draw(logits.device)
        return nucleus(logits, self.sampling.temperature, self.sampling.top_p, draws)


def nucleus(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """Top-p sampling by inversion: token ids int64 [batch].

    Tokens are ordered by falling probability, ties by id; the last one kept is the one with which
    ``top_p`` is reached. ``draws`` [batch], float64 in [0, 1), pick a point of the kept
    probability, so that a logit's rounding seldom changes the token. Source: Holtzman et al.,
    arXiv:1904.09751.
    """
    weights = (logits.double() / temperature).softmax(-1)
    probabilities, order = _likeliest(weights, top_p)
    cumulative = probabilities.cumsum(-1)
    kept = cumulative - probabilities < top_p
    # The first token is kept even where rounding says otherwise.
    count = kept.sum(-1, keepdim=True).clamp_min(1)
    mass = cumulative.gather(-1, count - 1)
    place = torch.searchsorted(cumulative, draws[:, None] * mass, right=True)
    # A draw next to 1 may round up to the mass itself.
    return order.gather(-1, torch.minimum(place, count - 1))[:, 0]


def _likeliest(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The largest of each row's probabilities by falling size, ties by id, and their ids: the
    nucleus, and more."""
    if weights.shape[-1] > 2 * _LIKELY:
        found = weights.topk(_LIKELY, -1)
        # Of tokens as likely as the last of these, others may have been left out.
        inside = found.values > found.values[:, -1:]
        if bool(((found.values * inside).sum(-1) >= top_p + 1e-9).all()):
            ids = found.indices.sort(-1).values
            values, places = weights.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
            return values, ids.gather(-1, places)
    return weights.sort(dim=-1, descending=True, stable=True)
