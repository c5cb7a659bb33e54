"""Streaming from LocalEngine, and ctrl-c."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from r1sae_fast.r1 import GenerationInterrupted, LocalEngine
from r1sae_fast.r1.taps import Apply, Capture

QUESTIONS = ["What is 12 plus 7?", "What is 3 times 4?", "Is 7 even?", "What is 9 minus 5 plus 1?"]


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    """TinyR1, in float32."""
    return LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equals_generate(engine: LocalEngine, batch_size: int) -> None:
    """Tokens, texts, ends: prompts of unequal lengths, some that stop before others, at R1's own
    temperature and top_p."""
    settings: dict[str, Any] = {"max_new_tokens": 40, "seed": 4, "batch_size": batch_size}
    settings["first_number"] = 7
    full = [3] * engine.context
    prompts = [*QUESTIONS, full]
    generations = engine.generate(prompts, **settings)
    assert generations == engine.generate(prompts, 40, 0.6, 0.95, 4, first_number=7)
    texts, tokens, ends = [""] * 5, [[] for _ in prompts], [None] * 5  # type: Any, Any, Any
    for event in engine.stream(prompts, **settings):
        number = event.sequence - 7
        assert ends[number] is None
        texts[number] += event.text
        tokens[number].append(event.token)
        ends[number] = event.finish_reason
    assert texts == [g.text for g in generations]
    assert tokens == [g.tokens[g.prompt_length :] for g in generations]
    assert ends[:4] == [g.finish_reason for g in generations[:4]]
    assert generations[4].finish_reason == "length"
    assert tokens[4] == []


def test_tokens_come_as_they_are_written(engine: LocalEngine) -> None:
    """One forward a step, and none before the first token is asked for."""
    forwards: list[int] = []

    def count(values: torch.Tensor) -> torch.Tensor:
        forwards.append(len(values))
        return values

    with engine.tap(Apply(0, count)):
        stream = engine.stream(QUESTIONS[:2], max_new_tokens=30, stop_ids=[])
        assert forwards == []
        for step in range(5):
            assert [next(stream).sequence, next(stream).sequence] == [0, 1]
            assert len(forwards) == step + 1
        stream.close()  # type: ignore[attr-defined]  # a generator
    assert len(forwards) == 5


def test_chat_with_earlier_turns(engine: LocalEngine) -> None:
    """A conversation's next answer: earlier thinking is stripped, <think> opened, and a prefill
    continued."""
    talk = [
        {"role": "user", "content": "What is 2 plus 2?"},
        {"role": "assistant", "content": "<think>\nOkay, secret.\n</think>\n\nIt is 4."},
        {"role": "user", "content": "What is 4 plus 1?"},
    ]
    tokenizer = engine.require_tokenizer()
    (generation,) = engine.generate([talk], max_new_tokens=8, prefill="Okay,", seed=1)
    prompt = tokenizer.decode(generation.tokens[: generation.prompt_length])
    assert "secret" not in prompt
    assert prompt.endswith("<｜Assistant｜><think>\nOkay,")
    assert "<｜Assistant｜>\n\nIt is 4.<｜end▁of▁sentence｜><｜User｜>" in prompt
    streamed = [event.text for event in engine.stream([talk], 8, prefill="Okay,", seed=1)]
    assert "".join(streamed) == generation.text


def test_bad_arguments_are_told_at_once(engine: LocalEngine) -> None:
    """By the call, not by the first token."""
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        engine.stream(["a", ""])
    with pytest.raises(ValueError, match="expected a list of prompts"):
        engine.stream("a")
    with pytest.raises(ValueError, match="top_p is 0"):
        engine.stream(["a"], top_p=0)


def test_ctrl_c_keeps_what_was_written(engine: LocalEngine) -> None:
    steps: list[int] = []

    def interrupt(values: torch.Tensor) -> torch.Tensor:
        steps.append(len(values))
        if len(steps) == 6:
            signal.raise_signal(signal.SIGINT)
        return values

    settings: dict[str, Any] = {"max_new_tokens": 50, "seed": 1, "batch_size": 2, "stop_ids": []}
    whole = engine.generate(QUESTIONS, **settings)
    capture = Capture(1)
    with pytest.raises(KeyboardInterrupt) as caught, engine.tap(Apply(2, interrupt), capture):
        engine.generate([[3] * engine.context, *QUESTIONS], first_number=-1 + 1, **settings)
    assert isinstance(caught.value, GenerationInterrupted)
    full, *others = caught.value.generations
    assert full.finish_reason == "length"
    assert [g.finish_reason for g in others] == ["interrupted"] * 4
    assert [len(g.tokens) - g.prompt_length for g in others] == [5, 0, 0, 0]
    assert len(steps) == 6
    assert len(capture) == len(engine.encode_prompt(QUESTIONS[0])) + 5
    # Nothing of it is left: the next call is as if it had not been.
    assert engine.generate(QUESTIONS, **settings) == whole


PROGRAM = """
import json, os, signal, torch
from r1sae_fast.r1 import GenerationInterrupted, LocalEngine
torch.set_num_threads(1)
engine = LocalEngine.from_pretrained("tiny-r1")
count = 0
try:
    for event in engine.stream(["What is 12 plus 7?"] * 8, max_new_tokens=300, stop_ids=[]):
        count += 1
        if count == 16:
            os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print(json.dumps({"count": count}), flush=True)
"""


def test_a_real_sigint_stops_at_once() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Counted in tokens, since machines stand still at times: within a step or two of eight.
    assert 16 <= json.loads(done.stdout)["count"] <= 16 + 2 * 8
