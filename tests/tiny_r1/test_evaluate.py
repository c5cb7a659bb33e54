"""The evaluation's own arithmetic, and the shipped model against its bars."""

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.tiny_r1.evaluate import auroc, cut_trace, final_answer, is_well_formed
from r1sae_fast.tiny_r1.problems import problems
from r1sae_fast.tiny_r1.traces import OPENING, trace

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5000001, 1.0]), min_size=1, max_size=8)


@given(SCORES, SCORES)
def test_auroc_counts_pairs(positive: list[float], negative: list[float]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        (f"{OPENING} x\n\nSo the answer is 4.\n</think>\n\nThe answer is 4.", "stop", True),
        (f"{OPENING} x\n</think>\n\nThe answer is 4.", "length", False),
        (f"{OPENING} x\n\nThe answer is 4.", "stop", False),
        (f"{OPENING} x\n</think>\n</think>\n\nThe answer is 4.", "stop", False),
        (f"{OPENING} x\n</think>\n\nThe answer is", "stop", False),
        ("Well, x\n</think>\n\nThe answer is 4.", "stop", False),
    ],
)
def test_well_formed(text: str, reason: str, expected: bool) -> None:
    assert is_well_formed(text, reason) is expected


def test_final_answer_reads_numbers_and_words() -> None:
    assert final_answer("\n\nThe answer is 42.") == "42"
    assert final_answer("\n\nThe answer is Friday.") == "Friday"
    assert final_answer("\n\nThe answer is 4. No.") is None


def test_cut_traces_differ_in_one_result() -> None:
    for index, problem in enumerate(islice(problems(1, held_out=True), 100)):
        right = cut_trace(problem, random.Random(index), slip=False)
        wrong = cut_trace(problem, random.Random(index), slip=True)
        whole = "".join(piece.text for piece in trace(problem))
        assert whole.startswith(right + " Check:")
        assert right != wrong
        assert right.rpartition(" is ")[0] == wrong.rpartition(" is ")[0]
