"""One feature: its label, then its scores. What was answered before is not asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from r1sae_fast.errors import LabelError
from r1sae_fast.features.summary import Score
from r1sae_fast.labels.answers import read_label, read_list
from r1sae_fast.labels.client import Client
from r1sae_fast.labels.cost import Prices, Usage, usage_of
from r1sae_fast.labels.endpoint import Endpoint
from r1sae_fast.labels.exchange import Request
from r1sae_fast.labels.journal import Answered, Finished, Journal
from r1sae_fast.labels.questions import QUESTIONS, Question, explain_question
from r1sae_fast.labels.score import Judged, score_of
from r1sae_fast.labels.settings import LabelSettings
from r1sae_fast.labels.windows import Sample

T = TypeVar("T")

TRIES = 3  # for an answer that can be read
_WARMER = 0.7  # temperature of further tries: at 0 the model would say the same again


def attempted(request: Request, attempt: int) -> Request:
    """The request as it is sent for the n-th time, from 0."""
    warmth = _WARMER if attempt else 0.0
    return Request(request.model, request.messages, request.max_tokens, warmth)


def usable(answered: Answered, read: Callable[[str], T | None]) -> T | None:
    """What an answer says; None where that can't be read."""
    # What was cut off at max_tokens was still reasoning, or in the midst of a word.
    return read(answered.reply.text) if answered.reply.finish != "length" else None


def told_before(
    journal: Journal, request: Request, read: Callable[[str], T | None]
) -> tuple[T | None, int]:
    """What a journal has in answer to a request, and how often it was asked until then."""
    for attempt in count():
        answered = journal.reply(attempted(request, attempt).key, attempt)
        if answered is None:
            return None, attempt
        found = usable(answered, read)
        if found is not None:
            return found, attempt + 1
    raise AssertionError("unreachable")


def tries_left(tried: int, *, retry_failed: bool) -> int:
    """How often a request is sent at most that was sent so often without a usable answer."""
    return TRIES if retry_failed else max(0, TRIES - tried)


class UnusableError(LabelError):
    """The model answers, but no label can be read."""


@dataclass
class Asker:
    """Asks about features, by a client and a journal that all share."""

    client: Client
    journal: Journal
    endpoint: Endpoint
    settings: LabelSettings
    prices: Prices | None
    asked: Usage  # by this run
    retry_failed: bool = False  # asks anew where no answer of the journal could be read
    replayed: int = 0  # answers that were in the journal

    async def label(self, sample: Sample) -> Finished:
        """Labels and scores a feature.

        Raises:
            UnusableError: no label could be read.
            RequestError, EndpointError, BudgetReachedError: as the client.
        """
        usage = Usage(cost=self.journal.lost(sample.feature))
        messages = explain_question(sample, self.settings)
        request = Request(self.endpoint.model, messages, self.settings.explain_tokens)
        label = await self._ask(sample.feature, request, read_label, usage)
        if label is None:
            raise UnusableError(
                "no line 'LABEL: ...' in any answer (empty, cut off at explain_tokens, "
                "or something else); they are kept and not asked for again, but with "
                "retry_failed (--retry-failed)"
            )
        scores = await _all(
            self._score(name, sample.feature, QUESTIONS[name](label, sample, self.settings), usage)
            for name in self.settings.scorers
        )
        return Finished(
            sample.feature,
            label,
            self.endpoint.model,
            self.settings.prompt_version,
            tuple(scores),
            usage,
        )

    async def _score(
        self, scorer: str, feature: int, questions: list[Question], usage: Usage
    ) -> Score:
        async def judge(question: Question) -> Judged:
            request = Request(self.endpoint.scorer, question.messages, self.settings.score_tokens)
            count = len(question.truth)
            said = await self._ask(feature, request, lambda text: read_list(text, count), usage)
            return question.truth, said

        return score_of(scorer, self.endpoint.scorer, await _all(map(judge, questions)))

    async def _ask(
        self, feature: int, request: Request, read: Callable[[str], T | None], usage: Usage
    ) -> T | None:
        def lost(cost: float) -> None:
            if cost:
                self.journal.add_lost(feature, cost)
                usage.cost += cost
                self.asked.cost += cost

        left: int | None = None
        for attempt in count():
            asked = attempted(request, attempt)
            answered = self.journal.reply(asked.key, attempt)
            if answered is None:
                # What was asked beyond the usual tries is in the journal too, and is read again.
                if left is None:
                    left = tries_left(attempt, retry_failed=self.retry_failed)
                if not left:
                    return None
                left -= 1
                reply = await self.client.ask(asked, lost)
                used = usage_of(asked, reply, self.prices)
                answered = Answered(feature, asked.key, attempt, reply, used)
                self.journal.add_reply(answered)
                self.asked.add(used)
            else:
                self.replayed += 1
            usage.add(answered.usage)
            found = usable(answered, read)
            if found is not None:
                return found
        raise AssertionError("unreachable")


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Does all at once, and raises only when all have ended: what is asked is also noted."""
    results = await asyncio.gather(*work, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done
