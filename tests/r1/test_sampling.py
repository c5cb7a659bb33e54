"""Nucleus sampling against the textbook, and the independence of the random streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.r1.sampling import Sampler, Sampling, nucleus


def textbook(logits: list[float], temperature: float, top_p: float, draw: float) -> int:
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    weights /= weights.sum()
    kept: list[int] = []
    for token in sorted(range(len(logits)), key=lambda i: (-weights[i], i)):
        kept.append(token)
        if sum(weights[kept]) >= top_p:
            break
    point = draw * sum(weights[kept])
    below = 0.0
    for token in kept:
        below += weights[token]
        if point < below:
            return token
    return kept[-1]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-20, 20), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_nucleus_is_the_textbook(
    logits: list[int], temperature: float, top_p: float, draw: float
) -> None:
    values = [number / 4 for number in logits]
    found = nucleus(
        torch.tensor([values]), temperature, top_p, torch.tensor([draw], dtype=torch.float64)
    )
    nearby = {
        textbook(values, temperature, p, d)
        for p in (top_p, top_p - 1e-9, min(top_p + 1e-9, 1))
        for d in (draw, max(draw - 1e-9, 0), min(draw + 1e-9, 1 - 1e-16))
    }
    assert int(found) in nearby


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    flatness=st.sampled_from([0.2, 1.0, 8.0]),
    top_p=st.sampled_from([0.3, 0.9, 0.999, 1.0]),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_a_large_vocabulary_is_searched_in_part(
    seed: int, flatness: float, top_p: float, draw: float
) -> None:
    """Many ties, some at the edge of the part that is looked at first."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-30, 4, (3, 700), generator=generator) / flatness
    draws = torch.full((3,), draw, dtype=torch.float64)
    weights, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = weights.cumsum(-1)
    count = (cumulative - weights < top_p).sum(-1, keepdim=True)
    place = torch.searchsorted(
        cumulative, draws[:, None] * cumulative.gather(-1, count - 1), right=True
    )
    expected = order.gather(-1, torch.minimum(place, count - 1))[:, 0]
    assert torch.equal(nucleus(logits, 1.0, top_p, draws), expected)
    assert torch.equal(nucleus(logits[:1], 1.0, top_p, draws[:1]), expected[:1])


def test_streams_are_those_of_single_draws() -> None:
    """Numbers are drawn ahead, and kept when sequences leave."""
    sampler = Sampler(Sampling(seed=5, top_p=1.0), [7, 8])
    logits = torch.zeros(2, 1000)
    streams = [np.random.Generator(np.random.Philox(key=[5, number])) for number in (7, 8)]
    for step in range(150):
        expected = [int(stream.random() * 1000) for stream in streams]
        if step == 30:
            sampler.keep([1])
        if step >= 30:
            expected = expected[1:]
        drawn = sampler(logits[: len(expected)])
        assert (drawn - torch.tensor(expected)).abs().max() <= 1  # 1000 times 0.001 is not quite 1


def test_frequencies() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    logits = probabilities.log().expand(4000, 5)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9), range(4000))
    counts = torch.bincount(sampler(logits), minlength=5) / 4000
    expected = torch.tensor([0.5, 0.25, 0.15, 0, 0]) / 0.9
    assert (counts - expected).abs().max() < 0.03  # over 3.8 standard deviations
    assert counts[3:].sum() == 0


def test_streams_depend_on_seed_and_number_only() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int, numbers: list[int], steps: int = 6) -> list[list[int]]:
        sampler = Sampler(Sampling(seed=seed, top_p=1.0), numbers)
        drawn = [sampler(logits.expand(len(numbers), -1)).tolist() for _ in range(steps)]
        return [list(column) for column in zip(*drawn, strict=True)]

    together = draw(3, [4, 9, 2])
    assert together == [draw(3, [n])[0] for n in (4, 9, 2)]
    assert len({tuple(row) for row in together}) == 3
    assert draw(4, [4]) != draw(3, [4])
    sampler = Sampler(Sampling(seed=3, top_p=1.0), [4, 9, 2])
    first = sampler(logits.expand(3, -1)).tolist()
    sampler.keep([2, 0])
    assert [first[2], first[0]] == [together[2][0], together[0][0]]
    assert sampler(logits.expand(2, -1)).tolist() == [together[2][1], together[0][1]]


def test_greedy_takes_the_lower_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    for sampling in (Sampling(greedy=True), Sampling(temperature=0.0)):
        assert Sampler(sampling, [0])(logits).tolist() == [1]


def test_logits_that_are_not_finite_name_the_sequence() -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="sequence 18"):
        Sampler(Sampling(), [17, 18])(logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]  # wrong on purpose
