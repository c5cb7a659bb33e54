"""The generator's problems are true, reproducible, and held out for good."""

import re
from itertools import islice

import pytest

from r1sae_fast.tiny_r1.problems import DAYS, FAMILIES, Problem, Step, distinct, problems


def some(count: int, *, held_out: bool = False, seed: int = 3) -> list[Problem]:
    return list(islice(problems(seed, held_out=held_out), count))


def solve(step: Step) -> str:
    """The result of a step's left side, worked out from its words."""
    words = step.left.split()
    if "days" in words:
        return DAYS[(DAYS.index(words[-1]) + int(words[0])) % 7]
    if "hours" in words:
        return str((int(words[-1]) + int(words[0]) - 1) % 12 + 1)
    left, operation, right = words
    sign = {"plus": "+", "minus": "-", "times": "*"}[operation]
    assert left.isdecimal()
    assert right.isdecimal()
    return str({"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)))


@pytest.mark.parametrize("held_out", [False, True])
def test_every_step_is_true_and_every_slip_is_false(held_out: bool) -> None:
    for problem in some(700, held_out=held_out):
        assert len(problem.steps) >= 2
        for step in problem.steps:
            assert step.result == solve(step)
            assert step.slips
            assert step.result not in step.slips
            assert len(set(step.slips)) == len(step.slips)


def test_a_comparison_is_a_true_subtraction_and_zero_for_the_result_alone() -> None:
    for problem in some(300):
        for step in problem.steps:
            for first in (step.result, *step.slips):
                left, difference = step.comparison(first)
                high, _, low = left.split()
                if high in DAYS:
                    assert DAYS[(DAYS.index(low) + int(difference)) % 7] == high
                else:
                    assert solve(Step(left, "", ())) == difference
                assert {high, low} == {first, step.result}
                assert (difference == "0") == (first == step.result)


def test_each_step_goes_on_from_what_is_known() -> None:
    for problem in some(700):
        known = set(re.findall(r"\w+", problem.prompt))
        for step in problem.steps:
            assert set(step.left.split()) <= known | {"plus", "minus", "days", "hours", "after"}
            known.add(step.result)


def test_numbers_stay_single_tokens() -> None:
    for problem in some(700):
        for step in problem.steps:
            for number in re.findall(r"\d+", f"{problem.prompt} {step.left} {step.result}"):
                assert 0 <= int(number) <= 99


def test_training_and_evaluation_never_share_a_prompt() -> None:
    training = {problem.prompt for problem in some(3000)}
    held_out = {problem.prompt for problem in some(1000, held_out=True)}
    assert not training & held_out
    assert all(problem.held_out for problem in some(100, held_out=True, seed=9))


def test_a_problem_depends_on_seed_and_index_only() -> None:
    whole = some(50)
    assert list(islice(problems(3, held_out=False, start=20), 30)) == whole[20:]
    assert some(50, seed=4) != whole


def test_families_take_turns() -> None:
    names = [problem.family for problem in some(2 * len(FAMILIES))]
    assert names == list(FAMILIES) * 2


def test_distinct_asks_nothing_twice() -> None:
    repeated = some(600, held_out=True)
    first = repeated[0].prompt
    prompts = [problem.prompt for problem in distinct(repeated, {first})]
    assert len(prompts) == len(set(prompts)) < 600
    assert set(prompts) == {problem.prompt for problem in repeated} - {first}
