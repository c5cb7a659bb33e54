"""What labelling would take: features, requests, tokens and money, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from r1sae_fast.features import FeatureDB
from r1sae_fast.labels.answers import read_label, read_list
from r1sae_fast.labels.ask import told_before, tries_left
from r1sae_fast.labels.cost import Prices, prompt_tokens
from r1sae_fast.labels.exchange import Request
from r1sae_fast.labels.journal import Journal, fingerprint, journal_path
from r1sae_fast.labels.questions import QUESTIONS, explain_question
from r1sae_fast.labels.select import labelled, select, some_of
from r1sae_fast.labels.settings import LabelSettings
from r1sae_fast.labels.windows import Sampler, TooFewError

LOOKED_AT = 40  # features never asked about whose prompts are made to count their tokens
_LOOKED_AT_BEGUN = 400  # of those asked about before: what is left differs from one to the next
_LABEL = "words about the tokens on which a feature is active, and what leads up to them, in thirty"
_ANSWERS = {"explain": 60, "score": 20}  # tokens of an answer without reasoning


@dataclass(frozen=True)
class LabelPlan:
    """What would be sent, if every answer can be used.

    ``features`` are to be labelled, ``before`` are already; ``begun`` of them this model was asked
    about, and is asked only what no answer was kept to. ``skipped`` have too few windows,
    ``given_up`` only answers that can't be used, so nothing is asked about them (but with
    ``retry_failed``).
    ``exact``: the prompts of all features were made (of ``looked_at`` of them); else these, and all
    sizes, are reckoned from a random choice. Tokens are never counted, but guessed by
    :func:`~r1sae_fast.labels.cost.estimate_tokens`. ``completion_tokens``: of a model that does not
    reason; ``most_completion_tokens``: if every answer is as long as it may be.
    """

    features: int
    before: int
    begun: int
    looked_at: int
    exact: bool
    skipped: int
    given_up: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    cost: float | None
    most_cost: float | None


@dataclass
class _Counts:
    """Sums over features."""

    begun: float = 0
    skipped: float = 0
    given_up: float = 0
    explains: float = 0
    scores: float = 0
    prompts: float = 0  # tokens

    def add(self, other: _Counts, scale: float) -> None:
        """Adds another's, each so many times."""
        for name in (field.name for field in fields(self)):
            setattr(self, name, getattr(self, name) + scale * getattr(other, name))


def plan_labels(
    path: str | Path,
    settings: LabelSettings | None = None,
    features: Sequence[int] | None = None,
    *,
    model: str | None = None,
    scorer: str | None = None,
    prices: Prices | None = None,
    retry_failed: bool = False,
) -> LabelPlan:
    """Tells what :func:`label_features` with the same arguments would send. Sends nothing.

    Args:
        path: the database.
        settings: sizes.
        features: which; default: all that are alive.
        model: the one that explains: what it has labelled, and what was answered when it was asked
            before, is left out.
        scorer: the one that scores; default: the same.
        prices: of tokens; without them no cost is told.
        retry_failed: as of :func:`label_features`.

    Raises:
        DatabaseError, LabelError, ValueError: as :func:`label_features`.
    """
    path, settings = Path(path).resolve(), settings or LabelSettings()
    with FeatureDB(path) as db:
        wanted = select(db, features)
        before: set[int] = set()
        journal = None
        if model is not None:
            version = settings.prompt_version
            before |= labelled(db, model, version)
            if journal_path(path).exists():
                journal = Journal(journal_path(path), fingerprint(db), read_only=True)
                before |= {f for f, *who in journal.finished if who == [model, version]}
        todo = [feature for feature in wanted if feature not in before]
        # By any model: whether it was this one, their prompts tell.
        asked = set() if journal is None else journal.unfinished
        parts = (
            ([feature for feature in todo if feature in asked], _LOOKED_AT_BEGUN),
            ([feature for feature in todo if feature not in asked], LOOKED_AT),
        )
        planner = _Planner(db, settings, model or "", scorer or model or "", journal, retry_failed)
        total, looked_at = _Counts(), 0
        for part, most in parts:
            chosen = some_of(part, most, settings.seed)
            looked_at += len(chosen)
            for feature in chosen:
                total.add(planner.look(feature), len(part) / len(chosen))
    completion = total.explains * _ANSWERS["explain"] + total.scores * _ANSWERS["score"]
    most_completion = (
        total.explains * settings.explain_tokens + total.scores * settings.score_tokens
    )
    prompts = round(total.prompts)
    return LabelPlan(
        features=len(todo),
        before=len(wanted) - len(todo),
        begun=round(total.begun),
        looked_at=looked_at,
        exact=looked_at == len(todo),
        skipped=round(total.skipped),
        given_up=round(total.given_up),
        requests=round(total.explains + total.scores),
        prompt_tokens=prompts,
        completion_tokens=round(completion),
        most_completion_tokens=round(most_completion),
        cost=None if prices is None else prices.of(prompts, completion),
        most_cost=None if prices is None else prices.of(prompts, most_completion),
    )


class _Planner:
    """Makes the requests of a feature, and looks up which were answered."""

    def __init__(
        self,
        db: FeatureDB,
        settings: LabelSettings,
        model: str,
        scorer: str,
        journal: Journal | None,
        retry_failed: bool,
    ) -> None:
        self._sampler = Sampler(db, settings)
        self._settings = settings
        self._model = model
        self._scorer = scorer
        self._journal = journal
        self._retry_failed = retry_failed

    def look(self, feature: int) -> _Counts:
        """What would be asked about it."""
        found, s = _Counts(), self._settings
        try:
            sample = self._sampler.sample(feature)
        except TooFewError:
            found.skipped = 1
            return found
        request = Request(self._model, explain_question(sample, s), s.explain_tokens)
        label: str | None = None
        tried = 0
        if self._journal is not None:
            label, tried = told_before(self._journal, request, read_label)
        if label is not None or tried:
            found.begun = 1
        if label is None:
            if not tries_left(tried, retry_failed=self._retry_failed):
                found.given_up = 1
                return found
            found.explains += 1
            found.prompts += prompt_tokens(request)
        for name in s.scorers:
            for question in QUESTIONS[name](label or _LABEL, sample, s):
                count = len(question.truth)
                request = Request(self._scorer, question.messages, s.score_tokens)
                if label is None or self._is_asked(request, count):
                    found.scores += 1
                    found.prompts += prompt_tokens(request)
        return found

    def _is_asked(self, request: Request, count: int) -> bool:
        if self._journal is None:
            return True
        said, tried = told_before(self._journal, request, lambda text: read_list(text, count))
        return said is None and tries_left(tried, retry_failed=self._retry_failed) > 0
