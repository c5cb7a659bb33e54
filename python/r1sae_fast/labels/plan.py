"""What labelling would take: features, requests, tokens and money, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1sae_fast.features import FeatureDB
from r1sae_fast.labels.cost import Prices, prompt_tokens
from r1sae_fast.labels.exchange import Request
from r1sae_fast.labels.questions import QUESTIONS, explain_question
from r1sae_fast.labels.select import labelled, select, some_of
from r1sae_fast.labels.settings import LabelSettings
from r1sae_fast.labels.windows import Sampler, TooFewError

LOOKED_AT = 40  # features whose prompts are made to count their tokens
_LABEL = "words about the tokens on which a feature is active, and what leads up to them, in thirty"
_ANSWERS = {"explain": 60, "score": 20}  # tokens of an answer without reasoning


@dataclass(frozen=True)
class LabelPlan:
    """An estimate. Of tokens by :func:`~r1sae_fast.labels.cost.estimate_tokens`, roughly.

    ``features`` are to be labelled, ``before`` are already; the shares of those that have too few
    windows, and all sizes, are of ``looked_at`` features whose prompts were made.
    ``completion_tokens``: of a model that does not reason; ``most_completion_tokens``: if every
    answer is as long as it may be.
    """

    features: int
    before: int
    looked_at: int
    skipped: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    cost: float | None
    most_cost: float | None


def plan_labels(
    path: str | Path,
    settings: LabelSettings | None = None,
    features: Sequence[int] | None = None,
    *,
    model: str | None = None,
    prices: Prices | None = None,
) -> LabelPlan:
    """Estimates what :func:`label_features` with the same arguments would take. Sends nothing.

    Args:
        path: the database.
        settings: sizes.
        features: which; default: all that are alive.
        model: the one that explains: what it has labelled already is left out.
        prices: of tokens; without them no cost is told.

    Raises:
        DatabaseError, LabelError, ValueError: as :func:`label_features`.
    """
    settings = settings or LabelSettings()
    with FeatureDB(path) as db:
        wanted = select(db, features)
        before = set() if model is None else labelled(db, model, settings.prompt_version)
        todo = [feature for feature in wanted if feature not in before]
        looked_at = some_of(todo, LOOKED_AT, settings.seed)
        sampler = Sampler(db, settings)
        skipped = requests = explains = prompts = 0
        for feature in looked_at:
            try:
                sample = sampler.sample(feature)
            except TooFewError:
                skipped += 1
                continue
            messages = [explain_question(sample, settings)]
            explains += 1
            for scorer in settings.scorers:
                messages += [q.messages for q in QUESTIONS[scorer](_LABEL, sample, settings)]
            requests += len(messages)
            prompts += sum(prompt_tokens(Request("", text, 1)) for text in messages)
    scale = len(todo) / max(len(looked_at), 1)
    scores = requests - explains
    completion = explains * _ANSWERS["explain"] + scores * _ANSWERS["score"]
    most = explains * settings.explain_tokens + scores * settings.score_tokens
    counts = [round(scale * n) for n in (requests, prompts, completion, most)]
    return LabelPlan(
        len(todo),
        len(wanted) - len(todo),
        len(looked_at),
        skipped,
        counts[0],
        counts[1],
        counts[2],
        counts[3],
        None if prices is None else prices.of(counts[1], counts[2]),
        None if prices is None else prices.of(counts[1], counts[3]),
    )
