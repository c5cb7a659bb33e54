"""Tokenizer, chat template and segments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.chat import CHAT_TEMPLATE, Tokenizer
from r1sae_fast.r1.segments import Segment, segments

P, T, R, U = (int(segment) for segment in Segment)


def test_r1s_format(tokenizer: Tokenizer) -> None:
    assert tokenizer.render([{"role": "user", "content": "hi there"}]) == (
        "<｜begin▁of▁sentence｜><｜User｜>hi there<｜Assistant｜><think>\n"
    )


def test_earlier_thinking_is_stripped_and_system_text_comes_first(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm</think>\n\ntwo"},
        {"role": "user", "content": "three"},
        {"role": "system", "content": "and kind"},
    ]
    assert tokenizer.render(messages) == (
        "<｜begin▁of▁sentence｜>be brief\n\nand kind<｜User｜>one<｜Assistant｜>\n\ntwo"
        "<｜end▁of▁sentence｜><｜User｜>three<｜Assistant｜><think>\n"
    )
    assert tokenizer.render(messages, add_generation_prompt=False).endswith("<｜User｜>three")


def test_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}])
    assert ids[:2] == [0, 3]
    assert ids[-3:-1] == [4, 5]
    assert tokenizer.decode(ids) == tokenizer.render([{"role": "user", "content": "a b"}])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert (tokenizer.think_id, tokenizer.end_think_id) == (5, 6)
    assert tokenizer.vocab_size == 37
    assert tokenizer.decode([*tokenizer.encode("ab"), 90]) == "ab"


@settings(deadline=None)
@given(st.lists(st.sampled_from([*"abxyz \n.?", "<think>", "</think>", "<｜User｜>"])))
def test_text_round_trip(checkpoint: Path, parts: list[str]) -> None:
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    ids = tokenizer.encode("".join(parts))
    assert len(ids) == len(parts)
    assert tokenizer.decode(ids) == "".join(parts)


def test_the_same_as_transformers(checkpoint: Path, tokenizer: Tokenizer) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    messages = [
        {"role": "user", "content": "  what is it?\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nwell"},
        {"role": "user", "content": "and <think> that?"},
    ]
    for prompt in (True, False):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert text == tokenizer.render(messages, add_generation_prompt=prompt)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "message 0 has content None"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 1 has role None"),
        ([{"role": "robot", "content": "a"}], "unknown role robot"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.render(messages)


def test_a_template_cannot_reach_out(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    config = json.loads((tmp_path / "c/tokenizer_config.json").read_text())
    for template in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ):
        config["chat_template"] = template
        (tmp_path / "c/tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="template refuses"):
            Tokenizer.from_pretrained(tmp_path / "c").render([{"role": "user", "content": "a"}])


def test_damaged_files(checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    shutil.copytree(checkpoint, directory)
    config_path = directory / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    user = [{"role": "user", "content": "a"}]

    del config["chat_template"]
    config_path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no chat_template"):
        Tokenizer.from_pretrained(directory).render(user)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert Tokenizer.from_pretrained(directory).render(user).endswith("<think>\n")
    config_path.write_text(json.dumps({**config, "chat_template": "{% if %}"}))
    with pytest.raises(CheckpointError, match="chat_template"):
        Tokenizer.from_pretrained(directory).render(user)

    # R1's own file writes its special tokens as objects.
    config_path.write_text(json.dumps({**config, "eos_token": {"content": "<｜User｜>"}}))
    assert Tokenizer.from_pretrained(directory).eos_id == 3
    config_path.write_text(json.dumps({**config, "eos_token": "<eos>"}))
    with pytest.raises(CheckpointError, match="eos_token is '<eos>'"):
        Tokenizer.from_pretrained(directory)
    config_path.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        Tokenizer.from_pretrained(directory)
    config_path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer.from_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(directory)


THINK, END = 5, 6


@pytest.mark.parametrize(
    ("tokens", "prompt_length", "expected"),
    [
        # generated after the template's <think>
        ([0, 9, THINK, 7, 8, END, 9, 1], 4, [P, P, T, T, T, T, R, R]),
        # still thinking
        ([0, 9, THINK, 7, 8], 4, [P, P, T, T, T]),
        # the model opens <think> itself
        ([0, 9, THINK, 8, END, 9], 2, [P, P, T, T, T, R]),
        # no thinking at all
        ([0, 9, 8, 8], 2, [P, P, R, R]),
        # </think> without <think>
        ([0, 9, 8, END, 8], 2, [P, P, T, T, R]),
        # the user writes about <think>...</think>; the model then thinks
        ([0, THINK, 9, END, THINK, 8, END, 9], 5, [P, P, P, P, T, T, T, R]),
        # only the first </think> ends the thinking
        ([THINK, 8, END, 9, END], 1, [T, T, T, R, R]),
        # a given text, of which the prompt's length is not known
        ([0, 9, THINK, 8, END, 9], None, [P, P, T, T, T, R]),
        ([0, 9, 8, 9], None, [U, U, U, U]),
        ([], None, []),
        ([], 0, []),
    ],
)
def test_segments(tokens: list[int], prompt_length: int | None, expected: list[int]) -> None:
    found = segments(tokens, think_id=THINK, end_think_id=END, prompt_length=prompt_length)
    assert found == expected
    assert all(type(value) is int for value in found)


def test_segments_without_thinking_tokens() -> None:
    def find(prompt_length: int | None) -> list[int]:
        return segments([1, 2], think_id=None, end_think_id=None, prompt_length=prompt_length)

    assert find(1) == [P, R]
    assert find(None) == [U, U]
