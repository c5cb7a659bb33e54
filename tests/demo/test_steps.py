"""Steps are found where they are, and judged by what they claim."""

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.demo.steps import MOMENTS, find_steps, truth
from r1sae_fast.tiny_r1 import vocabulary
from r1sae_fast.tiny_r1.dataset import prompt_text
from r1sae_fast.tiny_r1.problems import problems
from r1sae_fast.tiny_r1.traces import trace

TOKENIZER = vocabulary.build()


def decode(token: int) -> str:
    return TOKENIZER.decode([token], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("34 plus 7", "41"),
        ("34 minus 9", "25"),
        ("7 times 8", "56"),
        ("9 days after Monday", "Wednesday"),
        ("5 hours after 9", "2"),
        ("3 hours after 9", "12"),
        ("34 plus", None),
        ("34 over 2", None),
        ("5 days after Easter", None),
    ],
)
def test_truth(left: str, right: str | None) -> None:
    assert truth(left) == right


@given(seed=st.integers(0, 10_000), slip_rate=st.sampled_from([0.0, 0.3, 1.0]))
def test_steps_of_written_traces(seed: int, slip_rate: float) -> None:
    """The generator knows which steps slip; here that is computed from the text alone."""
    for problem in islice(problems(seed, held_out=False), 6):
        rng = random.Random(seed)
        pieces = trace(problem, rng, slip_rate)
        slips = [piece for piece in pieces if piece.kind == "slip"]
        text = prompt_text(problem) + "".join(piece.text for piece in pieces)
        tokens = TOKENIZER.encode(text).ids
        steps = find_steps(tokens, decode)
        assert [step.left for step in steps] == [step.left for step in problem.steps]
        wrong = [step for step in steps if step.wrong]
        assert [f" {step.result}" for step in wrong] == [piece.text for piece in slips]
        assert all(step.waited == step.wrong for step in steps)
        for step, real in zip(steps, problem.steps, strict=True):
            at = {moment: decode(tokens[step.places[moment]]) for moment in MOMENTS}
            assert at == {
                "result": f" {step.result}",
                "check": f" {real.result}",
                "compare": " is",
                "verdict": ".",
            }
            after = decode(tokens[step.places["verdict"] + 1])
            assert after == (" Wait" if step.wrong else after)
            assert after in (" Wait", " Next", " So")
            # Nothing of the difference is visible yet where it is about to come.
            assert tokens[step.places["compare"] + 1] != tokens[step.places["compare"]]


def test_what_is_no_step_is_passed_over() -> None:
    text = "First, the moon is 5. Check: the moon is 5. Compare: 5 minus 5 is 0. So 3 plus 4 is 7."
    assert find_steps(TOKENIZER.encode(text).ids, decode) == []
    assert find_steps([], decode) == []
