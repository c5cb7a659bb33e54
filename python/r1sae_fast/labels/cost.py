"""Tokens and money: estimated before, counted after, and never above a cap."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from r1sae_fast.labels.exchange import Reply, Request

_PIECES = re.compile(r"[^\W\d_]+|\d{1,3}|[^\w\s]|_|\s+")
_WORD = 7  # letters of a word that are one token in most vocabularies
_PER_MESSAGE = 6  # tokens that a chat template adds
_TO_BE_SURE = 1.5  # before anything was counted, an estimate may be so much too low


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is, without the model's tokenizer.

    Words of up to seven letters, groups of three digits and single signs count one; letters
    outside the Latin alphabets one each. Within a fifth for English and code.
    """
    tokens = 0
    for piece in _PIECES.findall(text):
        if piece.isspace():
            tokens += piece.count("\n") > 0
        elif piece.isascii():
            tokens += -(-len(piece) // _WORD)
        else:
            tokens += len(piece)
    return tokens


def prompt_tokens(request: Request) -> int:
    """About how many tokens a request sends."""
    return estimate_tokens(request.text) + _PER_MESSAGE * len(request.messages)


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in whatever money the cap is in.

    Raises:
        ValueError: negative, or no number.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for name, price in (("prompt", self.prompt), ("completion", self.completion)):
            if not 0 <= price < float("inf"):
                raise ValueError(f"the price of {name} tokens is {price}; expected 0 or more")

    def of(self, prompt: float, completion: float) -> float:
        """What so many tokens cost."""
        return (prompt * self.prompt + completion * self.completion) / 1e6


@dataclass
class Usage:
    """What was answered and what it took."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, other: Usage) -> None:
        """Adds another's to this one."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cost += other.cost


def usage_of(request: Request, reply: Reply, prices: Prices | None) -> Usage:
    """One answer's; estimated where the server doesn't count."""
    prompt = reply.prompt_tokens
    completion = reply.completion_tokens
    if prompt is None:
        prompt = prompt_tokens(request)
    if completion is None:
        completion = estimate_tokens(reply.text)
    return Usage(1, prompt, completion, prices.of(prompt, completion) if prices else 0.0)


class BudgetReachedError(Exception):
    """The next request could pass the cap."""


class Budget:
    """Lets a request go only if the cap holds whatever the answer's length.

    What a request may cost at most is set aside until its answer is counted. A request that doesn't
    fit waits for others to be counted, and is refused once there are none.

    Args:
        prices: None: nothing costs anything.
        cap: None: no limit.
        spent: before.
    """

    def __init__(self, prices: Prices | None, cap: float | None, spent: float = 0.0) -> None:
        self._prices = prices
        self._cap = cap
        self._aside = 0.0
        self._open = 0
        self._ratio = _TO_BE_SURE  # tokens counted for one estimated, at most
        self._changed = asyncio.Condition()
        self.spent = spent

    def worst(self, request: Request) -> float:
        """What a request may cost at most."""
        if self._prices is None:
            return 0.0
        return self._prices.of(self._ratio * prompt_tokens(request), request.max_tokens)

    async def reserve(self, request: Request) -> float:
        """Sets aside what a request may cost.

        Raises:
            BudgetReachedError: it doesn't fit under the cap.
        """
        if self._prices is None or self._cap is None:
            return 0.0
        async with self._changed:
            while True:
                worst = self.worst(request)
                if self.spent + self._aside + worst <= self._cap:
                    self._aside += worst
                    self._open += 1
                    return worst
                if not self._open:
                    raise BudgetReachedError
                await self._changed.wait()

    async def settle(
        self, aside: float, request: Request, reply: Reply | None, *, billed: bool
    ) -> None:
        """Counts what a request did cost.

        ``billed``: there is no answer, but the model may have run: all that was set aside counts.
        """
        if reply is not None:
            self.spent += usage_of(request, reply, self._prices).cost
        elif billed:
            self.spent += aside or self.worst(request)
        if self._prices is None or self._cap is None:
            return
        if reply is not None and reply.prompt_tokens is not None:
            self._ratio = max(self._ratio, 1.05 * reply.prompt_tokens / prompt_tokens(request))
        async with self._changed:
            self._aside -= aside
            self._open -= 1
            self._changed.notify_all()
