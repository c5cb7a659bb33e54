"""What is asked about a feature: for its label, then for each score a few windows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1sae_fast.labels.passages import (
    active_positions,
    choose_marks,
    marked,
    plain,
    strengths_line,
)
from r1sae_fast.labels.prompts import (
    Messages,
    detection_messages,
    explain_messages,
    fuzzing_messages,
)
from r1sae_fast.labels.settings import SCORERS, LabelSettings
from r1sae_fast.labels.windows import Sample


@dataclass(frozen=True)
class Question:
    """A scorer's prompt with some windows, and the truth about each."""

    messages: Messages
    truth: tuple[bool, ...]


def explain_question(sample: Sample, settings: LabelSettings) -> Messages:
    """The request for a feature's label."""
    marks = choose_marks(sample.explain)
    passages = []
    # The strongest first: what is at the beginning is what a label leans on most.
    for window in sorted(sample.explain, key=lambda w: (-w.largest, w.place)):
        positions = active_positions(window, settings.threshold)
        strengths = strengths_line(window, positions, sample.largest)
        passages.append(f"{marked(window, positions, marks)}\n{strengths}")
    return explain_messages(passages, marks)


def detection_questions(label: str, sample: Sample, settings: LabelSettings) -> list[Question]:
    """Is the feature active anywhere in this window?"""
    windows = [*sample.test, *sample.negatives]
    truth = [True] * len(sample.test) + [False] * len(sample.negatives)
    return [
        Question(detection_messages(label, [plain(windows[i]) for i in part]), _at(truth, part))
        for part in _parts(len(windows), sample, settings, "detection")
    ]


def fuzzing_questions(label: str, sample: Sample, settings: LabelSettings) -> list[Question]:
    """Are the marked tokens those on which the feature is active?

    A window without the feature gets the marks of an active one, at the same places: as many,
    as long and as near to each other, so that they can be told by what they mark alone.
    """
    windows = [*sample.test, *sample.negatives]
    positions = [active_positions(window, settings.threshold) for window in sample.test]
    random = np.random.default_rng([settings.seed, sample.feature, len(SCORERS)])
    wrong: list[tuple[int, ...]] = []
    for window in sample.negatives:
        pattern = positions[int(random.integers(len(positions)))]
        fitting = tuple(i for i in pattern if i < len(window.texts))
        wrong.append(fitting or (int(random.integers(len(window.texts))),))
    truth = [True] * len(sample.test) + [False] * len(sample.negatives)
    all_positions = [*positions, *wrong]
    questions = []
    for part in _parts(len(windows), sample, settings, "fuzzing"):
        marks = choose_marks(windows[i] for i in part)
        passages = [marked(windows[i], all_positions[i], marks) for i in part]
        questions.append(Question(fuzzing_messages(label, passages, marks), _at(truth, part)))
    return questions


QUESTIONS = {"detection": detection_questions, "fuzzing": fuzzing_questions}


def _parts(count: int, sample: Sample, settings: LabelSettings, scorer: str) -> list[list[int]]:
    """All windows in a random order, ``shown`` at a time."""
    random = np.random.default_rng([settings.seed, sample.feature, SCORERS.index(scorer)])
    order: list[int] = random.permutation(count).tolist()
    return [order[i : i + settings.shown] for i in range(0, count, settings.shown)]


def _at(truth: Sequence[bool], part: Sequence[int]) -> tuple[bool, ...]:
    return tuple(truth[i] for i in part)
