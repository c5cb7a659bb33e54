"""How well a label tells: balanced accuracy and F1 of a scorer's answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from r1sae_fast.features.summary import Score

Judged = tuple[Sequence[bool], Sequence[bool] | None]
"""The truth about some windows, and what was answered; None where no answer could be read."""


def score_of(scorer: str, judge: str, judged: Iterable[Judged]) -> Score:
    """Counts. Windows without a readable answer are left out and counted, as by delphi."""
    counts = {(truth, said): 0 for truth in (True, False) for said in (True, False)}
    unanswered = 0
    for truths, answers in judged:
        if answers is None:
            unanswered += len(truths)
            continue
        for pair in zip(truths, answers, strict=True):
            counts[pair] += 1
    return Score(
        scorer,
        judge,
        true_positives=counts[True, True],
        false_negatives=counts[True, False],
        true_negatives=counts[False, False],
        false_positives=counts[False, True],
        unanswered=unanswered,
    )
