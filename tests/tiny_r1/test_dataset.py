"""Traces, their tokens, weights and marks."""

import random
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from r1sae_fast.r1.chat import EOS
from r1sae_fast.tiny_r1 import vocabulary
from r1sae_fast.tiny_r1.dataset import Batch, batches, prompt_text
from r1sae_fast.tiny_r1.problems import problems
from r1sae_fast.tiny_r1.traces import OPENING, LossWeights, trace

TOKENIZER = vocabulary.build()


def some_batches(count: int, *, start: int = 0, slip_rate: float = 0.3) -> list[Batch]:
    stream = batches(
        TOKENIZER,
        seed=1,
        batch_size=6,
        slip_rate=slip_rate,
        loss=LossWeights(),
        start=start,
        pool=3,
    )
    return list(islice(stream, count))


@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_pieces_end_on_token_boundaries() -> None:
    for index, problem in enumerate(islice(problems(5, held_out=False), 300)):
        pieces = trace(problem, random.Random(index), 0.3)
        texts = [prompt_text(problem), *(piece.text for piece in pieces), EOS]
        apart = [token for text in texts for token in TOKENIZER.encode(text).ids]
        assert apart == TOKENIZER.encode("".join(texts)).ids


def test_the_world_needs_no_byte_tokens() -> None:
    known = {TOKENIZER.encode(word).ids[0] for word in vocabulary.words()}
    special = {TOKENIZER.token_to_id(token) for token in vocabulary.SPECIAL}
    for index, problem in enumerate(islice(problems(5, held_out=False), 300)):
        text = prompt_text(problem) + "".join(
            p.text for p in trace(problem, random.Random(index), 0.3)
        )
        assert set(TOKENIZER.encode(text).ids) <= known | special


def test_special_tokens_have_r1s_first_ids() -> None:
    assert [TOKENIZER.token_to_id(token) for token in vocabulary.SPECIAL[:3]] == [0, 1, 2]
    assert TOKENIZER.get_vocab_size() <= 512


def test_a_trace_opens_like_r1_and_says_wait_only_after_slips() -> None:
    slips = 0
    for index, problem in enumerate(islice(problems(8, held_out=False), 200)):
        pieces = trace(problem, random.Random(index), 0.4)
        assert pieces[0].text.startswith(OPENING)
        slipped = sum(piece.kind == "slip" for piece in pieces)
        waited = [piece for piece in pieces if "Wait" in piece.text]
        assert len(waited) == slipped
        assert all(piece.after_slip for piece in waited)
        assert f"The answer is {problem.answer}." in pieces[-1].text
        slips += slipped
    assert slips > 50
    assert not any("Wait" in p.text for p in trace(next(problems(8, held_out=False))))


def test_batches_go_on_from_any_index() -> None:
    whole = some_batches(7)
    for start in (2, 3, 5):
        for resumed, first in zip(some_batches(7 - start, start=start), whole[start:], strict=True):
            assert torch.equal(resumed.tokens, first.tokens)
            assert torch.equal(resumed.weights, first.weights)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return TOKENIZER


def test_marks_and_weights_sit_on_their_tokens(tokenizer: Tokenizer) -> None:
    wait = tokenizer.encode(" Wait").ids[0]
    pad = 2
    for batch in some_batches(3):
        targets = batch.tokens[:, 1:]
        assert batch.weights.shape == batch.decisions.shape == targets.shape
        assert bool((targets[batch.decisions == 2] == wait).all())
        assert not bool((targets[batch.decisions == 1] == wait).any())
        assert int((targets == wait).sum()) == int((batch.decisions == 2).sum())
        assert bool((batch.weights[targets == pad] == 0).all())
        assert bool((batch.weights[batch.decisions > 0] == LossWeights().decision).all())
