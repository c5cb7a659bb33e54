"""Reasoning traces in R1's manner for a problem: steps, checks, slips and their correction.

A trace is a list of pieces of text, each with the weight of its tokens in the training loss and a
mark that says what the piece is. A slip is a wrong result that the check right after it reveals;
"Wait" and the right result follow. Each step is checked by doing it again and subtracting the two
results in plain sight: whether two tokens are equal is a question that a small model learns to
answer inside itself only after very long training, a subtraction it knows soon.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from r1sae_fast.tiny_r1.problems import Problem

OPENING = "Okay, so the user has asked"
"""How each trace begins, as R1's own do."""


@dataclass(frozen=True)
class LossWeights:
    """Weight of each kind of token in the loss; prompts are never trained on.

    A slip's own token weighs little: enough that the model sometimes slips when sampled, so that
    its corrections happen in earnest, too little to change its greedy choice.
    """

    prompt: float = 0.0
    plain: float = 1.0
    result: float = 2.0
    slip: float = 0.2
    decision: float = 2.0


@dataclass(frozen=True)
class Piece:
    """Text that begins and ends on a token boundary. ``kind`` is a field of LossWeights.

    ``decision`` marks the first token after a comparison, where "Wait" is or is not due;
    ``after_slip`` tells which.
    """

    text: str
    kind: str = "plain"
    after_slip: bool = False


def trace(
    problem: Problem, rng: random.Random | None = None, slip_rate: float = 0.0
) -> list[Piece]:
    """The pieces of R1's answer to ``problem``, from after ``<think>\\n`` to the end.

    Args:
        problem: what is asked.
        rng: draws which steps slip and how; needed when ``slip_rate`` is positive.
        slip_rate: probability that a step slips.
    """
    pieces = [Piece(f"{OPENING} {problem.retold}\n\n")]
    after_slip = False
    for index, step in enumerate(problem.steps):
        slip = rng.choice(step.slips) if rng is not None and rng.random() < slip_rate else None
        opening = "First" if index == 0 else " Next"
        pieces.append(Piece(opening, "plain" if index == 0 or after_slip else "decision"))
        pieces.append(Piece(f", {step.left} is"))
        if slip is None:
            pieces.append(Piece(f" {step.result}", "result"))
        else:
            pieces.append(Piece(f" {slip}", "slip"))
        pieces.append(Piece(f". Check: {step.left} is"))
        pieces.append(Piece(f" {step.result}", "result"))
        left, difference = step.comparison(slip or step.result)
        pieces.append(Piece(f". Compare: {left} is"))
        pieces.append(Piece(f" {difference}", "result"))
        pieces.append(Piece("."))
        after_slip = slip is not None
        if after_slip:
            pieces.append(Piece(" Wait", "decision", after_slip=True))
            pieces.append(Piece(", that was wrong. It is"))
            pieces.append(Piece(f" {step.result}", "result"))
            pieces.append(Piece("."))
    pieces.append(Piece(" So", "plain" if after_slip else "decision"))
    pieces.append(Piece(f" the answer is {problem.answer}.\n"))
    pieces.append(Piece("</think>"))
    pieces.append(Piece(f"\n\nThe answer is {problem.answer}."))
    return pieces
