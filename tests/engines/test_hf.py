"""HfEngine: any transformers decoder under the same residuals, taps, texts and harvests."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.errors import CheckpointError, MissingExtraError
from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import GenerationInterrupted, HfEngine
from r1sae_fast.r1.taps import AddDirection, Apply, Capture, SetFeatures
from r1sae_fast.shards import ActivationShards, CodeShards

PROMPTS = ["what is it?", "a", "why does the cat sit on the mat and not on the dog?", "gø."]
TOKENS = [[2, 50, 60, 70, 80, 90], [2, 100, 110], [2, 20, 30, 40]]


def hidden_states(engine: HfEngine, tokens: Sequence[int]) -> Any:
    with torch.no_grad():
        output = engine.model(torch.tensor([tokens]), output_hidden_states=True)
    return output.hidden_states


def greedy(engine: HfEngine, prompt: Sequence[int], count: int) -> list[int]:
    """The obvious way: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(engine.logits([tokens])[0, -1].argmax()))
        if tokens[-1] in engine.default_stop_ids:
            break
    return tokens


def test_residuals_are_the_hidden_states(hf: HfEngine) -> None:
    tokens = torch.randint(2, 260, (1, 20), generator=torch.Generator().manual_seed(0))
    states = hidden_states(hf, tokens[0].tolist())
    for layer in range(3):
        assert torch.equal(hf.residuals(tokens, layer), states[layer + 1])
    # transformers gives the last one normalised.
    last = hf.residuals(tokens, 3)
    assert torch.equal(hf.decoder.norm(last), states[4])  # type: ignore[operator]  # a module
    assert torch.equal(hf.logits(tokens), hf.model(tokens).logits.detach())


def test_padding_on_the_right(hf: HfEngine) -> None:
    lengths = [6, 3, 4]
    padded = torch.zeros(3, 6, dtype=torch.int64)
    for row, tokens in zip(padded, TOKENS, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    residuals = hf.residuals(padded, 2, lengths)
    for row, tokens in zip(residuals, TOKENS, strict=True):
        alone = hf.residuals([tokens], 2)[0]
        torch.testing.assert_close(row[: len(tokens)], alone, rtol=1e-5, atol=1e-5)
        assert not row[len(tokens) :].any()


def test_stops_after_the_layer(hf: HfEngine) -> None:
    ran: list[int] = []
    for number, block in enumerate(hf.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    head: list[str] = []
    hf.model.lm_head.register_forward_pre_hook(lambda *_: head.append("head"))
    hf.residuals([[1, 2, 3]], 1)
    hf.run(TOKENS, [Capture(0), Capture("model.layers.1.mlp")])
    assert ran == [0, 1, 0, 1]
    assert not head


def test_truncated(hf: HfEngine, hf_checkpoint: Path) -> None:
    short = HfEngine.from_pretrained(hf_checkpoint, dtype=torch.float32, last_layer=1)
    assert (short.loaded_layers, short.num_layers) == (2, 4)
    assert torch.equal(short.residuals([TOKENS[0]], 1), hf.residuals([TOKENS[0]], 1))
    with pytest.raises(ValueError, match=r"layer 2 was not loaded .*last_layer was 1"):
        short.run(TOKENS, [Capture(2)])
    with pytest.raises(ValueError, match="without last_layer"):
        short.generate(["a"])
    with pytest.raises(ValueError, match="the model has 0 to 3"):
        HfEngine.from_pretrained(hf_checkpoint, last_layer=4)


def test_captures_equal_the_modules_outputs(hf: HfEngine) -> None:
    seen: dict[str, torch.Tensor] = {}
    block = hf.blocks[2]
    handles = [
        block.self_attn.register_forward_hook(lambda *a: seen.update(self_attn=a[2][0])),  # type: ignore[union-attr]  # a module
        block.mlp.register_forward_hook(lambda *a: seen.update(mlp=a[2])),  # type: ignore[union-attr]  # a module
    ]
    tokens = [TOKENS[0]]
    captures = {
        place: Capture(f"model.layers.2{place}") for place in (".input", ".self_attn", ".mlp", "")
    }
    hf.run(tokens, list(captures.values()))
    for handle in handles:
        handle.remove()
    states = hidden_states(hf, tokens[0])
    assert torch.equal(captures[".input"].values, states[2][0])
    assert torch.equal(captures[".self_attn"].values, seen["self_attn"][0])
    assert torch.equal(captures[".mlp"].values, seen["mlp"][0])
    assert torch.equal(captures[""].values, states[3][0])


def test_hooks_leave_nothing_behind(hf: HfEngine) -> None:
    before = hf.logits([TOKENS[0]])
    with hf.tap(Capture(1), AddDirection(2, torch.ones(48))):
        changed = hf.logits([TOKENS[0]])
        hf.generate(["go"], max_new_tokens=2)
        with pytest.raises(ZeroDivisionError), hf.tap(Apply(3, lambda x: x / (1 // 0))):
            hf.logits([TOKENS[0]])
    assert not torch.equal(before, changed)
    assert torch.equal(before, hf.logits([TOKENS[0]]))
    modules = list(hf.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_greedy_equals_full_passes(hf: HfEngine) -> None:
    generations = hf.generate(PROMPTS, max_new_tokens=12, greedy=True, batch_size=3)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        assert generation.tokens == greedy(hf, hf.encode_prompt(prompt), 12)
        assert len(generation.segments) == len(generation.tokens)


def test_draws_do_not_depend_on_the_batch(hf: HfEngine) -> None:
    together = hf.generate(PROMPTS, max_new_tokens=20, seed=11)
    for number in (0, 3):
        (alone,) = hf.generate([PROMPTS[number]], max_new_tokens=20, seed=11, first_number=number)
        assert alone == together[number]
    other = hf.generate(PROMPTS, max_new_tokens=20, seed=12)
    assert all(a.tokens != b.tokens for a, b in zip(together, other, strict=True))


def test_stop_ids_and_limits(hf: HfEngine) -> None:
    stops = set(range(0, 300, 4))
    prompts = [[2, 9, number] for number in range(20)] + [[3] * 155, [3] * 160]
    free = hf.generate(prompts, max_new_tokens=15, seed=1, stop_ids=(), batch_size=22)
    stopped = hf.generate(prompts, max_new_tokens=15, seed=1, stop_ids=stops, batch_size=22)
    for prompt, whole, generation in zip(prompts, free, stopped, strict=True):
        new = whole.tokens[len(prompt) :]
        assert len(new) == min(15, 160 - len(prompt))
        end = next((i + 1 for i, token in enumerate(new) if token in stops), None)
        assert generation.tokens == prompt + new[:end]
        assert generation.finish_reason == ("length" if end is None else "stop")
    assert hf.default_stop_ids == {1, 299}


def test_stream_equals_generate(hf: HfEngine) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 25,
        "seed": 3,
        "temperature": 2.0,
        "batch_size": 3,
    }
    generations = hf.generate(PROMPTS, **settings)
    texts, tokens = [""] * 4, [[] for _ in PROMPTS]  # type: list[str], list[list[int]]
    for event in hf.stream(PROMPTS, **settings):
        texts[event.sequence] += event.text
        tokens[event.sequence].append(event.token)
    assert texts == [g.text for g in generations]
    assert tokens == [g.tokens[g.prompt_length :] for g in generations]


def test_a_stream_that_is_left_early(hf: HfEngine) -> None:
    stream = hf.stream(PROMPTS, max_new_tokens=100, stop_ids=[])
    next(stream)
    with pytest.raises(RuntimeError, match="still generating"):
        hf.logits([TOKENS[0]])
    stream.close()  # type: ignore[attr-defined]  # a generator
    hf.logits([TOKENS[0]])
    assert not [t for t in threading.enumerate() if t.name == "r1sae-generate"]


def test_errors_come_out_of_the_thread(hf: HfEngine) -> None:
    with pytest.raises(ZeroDivisionError), hf.tap(Apply(1, lambda x: x / (1 // 0))):
        hf.generate(["a"], max_new_tokens=3)
    assert len(hf.generate(["a"], max_new_tokens=3, stop_ids=[])[0].tokens) > 3


def test_ctrl_c(hf: HfEngine) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    steps: list[float] = []

    def count(values: torch.Tensor) -> torch.Tensor:
        steps.append(time.monotonic())
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    with pytest.raises(GenerationInterrupted) as caught, hf.tap(Apply(0, count)):
        hf.generate(PROMPTS, max_new_tokens=100, stop_ids=[])
    assert len(steps) < 60
    written = [len(g.tokens) - g.prompt_length for g in caught.value.generations]
    assert max(written) < 60
    assert {g.finish_reason for g in caught.value.generations} == {"interrupted"}


@pytest.mark.parametrize("place", [".input", ".self_attn", ".mlp", ""])
def test_edits_reach_every_step(hf: HfEngine, place: str) -> None:
    """Rows of a batch with starts of their own equal single sequences read as a whole."""
    prompts = [hf.encode_prompt(prompt) for prompt in PROMPTS]
    starts = [len(prompt) - 1 + number for number, prompt in enumerate(prompts)]
    direction = 3 * torch.randn(48, generator=torch.Generator().manual_seed(1))
    edit = AddDirection(f"model.layers.1{place}", direction, [1.0, -1.0, 2.0, 0.5], start=starts)
    with hf.tap(edit):
        generations = hf.generate(prompts, max_new_tokens=10, greedy=True, stop_ids=[])
    plain = hf.generate(prompts, max_new_tokens=10, greedy=True, stop_ids=[])
    assert [g.tokens for g in generations] != [g.tokens for g in plain]
    for number, generation in enumerate(generations):
        alone = AddDirection(
            f"model.layers.1{place}", direction, edit.strength[number], start=starts[number]
        )
        with hf.tap(alone):
            chosen = hf.logits([generation.tokens[:-1]])[0].argmax(-1)
        begin = generation.prompt_length
        assert generation.tokens[begin:] == chosen[begin - 1 :].tolist()


def test_captures_while_generating(hf: HfEngine) -> None:
    capture, thinking = Capture(2), Capture(2, segments="thinking")
    with hf.tap(capture, thinking):
        generations = hf.generate(PROMPTS, max_new_tokens=8, stop_ids=[])
    for number, generation in enumerate(generations):
        tokens = generation.tokens[:-1]  # the last one was not read
        expected = hf.residuals([tokens], 2)[0]
        torch.testing.assert_close(capture.of(number), expected, rtol=1e-4, atol=1e-4)
        inside = torch.tensor(generation.segments[:-1]) == 1
        torch.testing.assert_close(thinking.of(number), expected[inside], rtol=1e-4, atol=1e-4)


def test_attached_sae(hf: HfEngine) -> None:
    torch.manual_seed(0)
    sae = FastSAE(48, 96, 8, mode="topk")
    tokens = torch.randint(2, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    codes = hf.codes(tokens, 1, sae)
    expected = sae.encode(hf.residuals(tokens, 1)).detach()
    torch.testing.assert_close(codes.to_dense().detach(), expected, rtol=1e-4, atol=1e-4)
    with hf.tap(SetFeatures(1, sae, {5: 30.0}, mode="relu"), Capture(1)) as (_, after):
        hf.logits(tokens)
    assert isinstance(after, Capture)
    residual = hf.residuals(tokens, 1).flatten(0, 1)
    current = sae.pre_activations(residual)[:, 5].relu()
    expected = residual + (30.0 - current)[:, None] * sae.W_dec[5]
    torch.testing.assert_close(after.values, expected.detach())


def test_text(hf: HfEngine, hf_checkpoint: Path) -> None:
    thinking = hf.require_tokenizer().think_id is not None
    assert thinking == ("qwen2" in str(hf_checkpoint))
    tokenizer = hf.require_tokenizer()
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": "three"},
    ]
    text = tokenizer.decode(hf.encode_prompt(talk))
    if thinking:
        assert text == "<|bos|><|user|>one<|bot|>two<|eos|><|user|>three<|bot|><think>\n"
        assert tokenizer.decode(hf.encode_text("hé")) == "<|bos|>hé"
        (generation,) = hf.generate(["go"], max_new_tokens=3, stop_ids=[])
        assert generation.segments == [0] * 5 + [1] * 5
    else:
        assert tokenizer.decode(hf.encode_text("hé")) == "hé"
        (generation,) = hf.generate(["go"], max_new_tokens=3, stop_ids=[])
        assert set(generation.segments) == {0, 2}


def test_harvest_equals_residuals(hf: HfEngine, tmp_path: Path) -> None:
    harvest(hf, PROMPTS, 1, tmp_path / "a", dtype="float32", max_new_tokens=6, batch_size=3)
    rows = ActivationShards(tmp_path / "a")[:]
    for number, generation in enumerate(hf.generate(PROMPTS, max_new_tokens=6, batch_size=3)):
        here = rows.sequence_id == number
        assert rows.tokens[here].tolist() == generation.tokens
        expected = hf.residuals([generation.tokens], 1)[0]
        torch.testing.assert_close(rows.activations[here], expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    sae = FastSAE(48, 96, 8, mode="topk")
    harvest(hf, PROMPTS, 1, tmp_path / "b", max_new_tokens=6, batch_size=3, sae=sae)
    codes = CodeShards(tmp_path / "b")[:].codes
    encoded = sae.encode(rows.activations).detach()
    torch.testing.assert_close(codes.to_dense(), encoded, rtol=1e-4, atol=1e-4)


def test_bare_model(hf: HfEngine) -> None:
    bare = HfEngine(hf.model)
    assert bare.generate([[2, 3, 9]], max_new_tokens=3)[0].text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.generate(["text"])


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        HfEngine.from_pretrained(tmp_path)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'r1sae-fast\[hf\]'"):
        HfEngine.from_pretrained(tmp_path)
