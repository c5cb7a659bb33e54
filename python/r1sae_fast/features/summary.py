"""What is known of one feature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A row of ``scores``: how well a label tells windows of text apart, as a model judged them.

    ``scorer`` is ``detection`` (is the feature active in this text?) or ``fuzzing`` (are the right
    tokens marked?), ``judge`` the model that judged. ``unanswered``: windows without a readable
    judgement, which count nowhere else.
    """

    scorer: str
    judge: str
    true_positives: int
    false_negatives: int
    true_negatives: int
    false_positives: int
    unanswered: int

    @property
    def true_positive_rate(self) -> float | None:
        """Of windows with the feature, the share judged so; None if none was judged."""
        return _share(self.true_positives, self.false_negatives)

    @property
    def true_negative_rate(self) -> float | None:
        """Of windows without the feature, the share judged so; None if none was judged."""
        return _share(self.true_negatives, self.false_positives)

    @property
    def balanced_accuracy(self) -> float | None:
        """The mean of both rates: 0.5 by chance, 1 at best; None if either is unknown."""
        rates = self.true_positive_rate, self.true_negative_rate
        return None if rates[0] is None or rates[1] is None else (rates[0] + rates[1]) / 2

    @property
    def margin(self) -> float | None:
        """Half of the 95% interval of ``balanced_accuracy``; None if that is unknown.

        By the normal approximation with two successes and two failures added (Agresti, Coull), so
        that it is no zero where all were judged rightly.
        """
        if self.balanced_accuracy is None:
            return None
        variance = 0.0
        for right, wrong in (
            (self.true_positives, self.false_negatives),
            (self.true_negatives, self.false_positives),
        ):
            share = (right + 2) / (right + wrong + 4)
            variance += share * (1 - share) / (right + wrong + 4) / 4
        return 1.96 * math.sqrt(variance)

    @property
    def precision(self) -> float | None:
        """Of windows judged to have the feature, the share that has; None if there are none."""
        return _share(self.true_positives, self.false_positives)

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall; None if nothing was judged."""
        if self.balanced_accuracy is None:
            return None
        wrong = self.false_positives + self.false_negatives
        return 2 * self.true_positives / (2 * self.true_positives + wrong or 1)


def _share(these: int, others: int) -> float | None:
    return these / (these + others) if these + others else None


@dataclass(frozen=True)
class Label:
    """A row of ``autointerp``: what a model, or counting (``model_name`` "statistics"), says.

    ``scores``: how well it does, where that was tried.
    """

    label: str
    quality: float | None
    interestingness: float | None
    model_name: str | None
    prompt_version: str | None
    scores: tuple[Score, ...] = ()

    @property
    def score(self) -> float | None:
        """The mean balanced accuracy of its scores; None if it has none."""
        known = [s.balanced_accuracy for s in self.scores if s.balanced_accuracy is not None]
        return sum(known) / len(known) if known else None

    @property
    def statistical(self) -> bool:
        """Whether it was counted and not interpreted."""
        return self.model_name == "statistics"


@dataclass(frozen=True)
class FeatureSummary:
    """A feature's statistics and labels. Fields that the file has no statistics for are None.

    ``histogram`` counts activations by strength, between :meth:`FeatureDB.histogram_edges`.
    ``segment_density``: in which share of each segment's tokens the feature is active.
    """

    feature_id: int
    count: int
    density: float | None
    mean: float | None
    max: float
    histogram: tuple[int, ...] | None
    segment_density: Mapping[str, float | None]
    clarity: float | None
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Labeller:
    """Who made labels: a model with a version of prompts, or ``statistics``.

    ``score``: the mean of its labels' mean balanced accuracies; None if none was scored.
    """

    model_name: str | None
    prompt_version: str | None
    labels: int
    score: float | None

    @property
    def statistical(self) -> bool:
        """Whether its labels are counted and not interpreted."""
        return self.model_name == "statistics"
