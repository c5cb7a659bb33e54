"""Token batches of traces: what the recipe trains on and what its checks read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from r1sae_fast.r1.chat import ASSISTANT, BOS, EOS, PAD, THINK, USER
from r1sae_fast.tiny_r1.problems import Problem, problems
from r1sae_fast.tiny_r1.traces import LossWeights, Piece, trace
from r1sae_fast.tiny_r1.vocabulary import SPECIAL


@dataclass(frozen=True)
class Batch:
    """Right-padded traces.

    ``tokens`` int64 [traces, seq]; ``weights`` float32 [traces, seq - 1], the loss weight of each
    next token; ``decisions`` int8 of the same shape: 1 where "Wait" is not due, 2 where it is.
    """

    tokens: Tensor
    weights: Tensor
    decisions: Tensor


@dataclass(frozen=True)
class _Encoded:
    tokens: list[int]
    weights: list[float]
    decisions: list[int]


def prompt_text(problem: Problem) -> str:
    """The conversation up to where R1 starts to think."""
    return f"{BOS}{USER}{problem.prompt}{ASSISTANT}{THINK}\n"


def _encode(
    tokenizer: Tokenizer, problem: Problem, pieces: list[Piece], loss: LossWeights
) -> _Encoded:
    end = Piece(EOS)
    texts = [Piece(prompt_text(problem), "prompt"), *pieces, end]
    tokens, weights, decisions = [], [], []
    for piece, encoding in zip(
        texts, tokenizer.encode_batch_fast([piece.text for piece in texts]), strict=True
    ):
        ids = encoding.ids
        tokens += ids
        weights += [getattr(loss, piece.kind)] * len(ids)
        mark = 0 if piece.kind != "decision" else 2 if piece.after_slip else 1
        decisions += [mark] + [0] * (len(ids) - 1)
    return _Encoded(tokens, weights[1:], decisions[1:])


def _pad(traces: list[_Encoded], pad: int) -> Batch:
    longest = max(len(encoded.tokens) for encoded in traces)

    def column(rows: list[list[int]] | list[list[float]], fill: int, width: int) -> Tensor:
        return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows])

    return Batch(
        column([encoded.tokens for encoded in traces], pad, longest),
        column([encoded.weights for encoded in traces], 0, longest - 1).float(),
        column([encoded.decisions for encoded in traces], 0, longest - 1).to(torch.int8),
    )


def batches(
    tokenizer: Tokenizer,
    *,
    seed: int,
    batch_size: int,
    slip_rate: float,
    loss: LossWeights,
    held_out: bool = False,
    start: int = 0,
    pool: int = 8,
) -> Iterator[Batch]:
    """An endless stream of batches; the i-th depends on the arguments and i only.

    ``pool`` batches are drawn together and sorted by length, so that little is padding, then
    taken in a random order.
    """
    pad = SPECIAL.index(PAD)
    index = start
    while True:
        group, offset = divmod(index, pool)
        first = group * pool * batch_size
        source = problems(seed, held_out=held_out, start=first)
        encoded = []
        for number in range(first, first + pool * batch_size):
            problem = next(source)
            rng = random.Random(f"{seed}/slips/{number}")
            pieces = trace(problem, rng, slip_rate)
            encoded.append(_encode(tokenizer, problem, pieces, loss))
        encoded.sort(key=lambda one: len(one.tokens))
        order = list(range(pool))
        random.Random(f"{seed}/order/{group}").shuffle(order)
        for position in order[offset:]:
            yield _pad(encoded[position * batch_size : (position + 1) * batch_size], pad)
            index += 1
