"""LocalEngine: generation on the cache, residuals, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.engines.base import fingerprint
from r1sae_fast.r1.engines.local import LocalEngine

QUESTIONS = ["what is it?", "a", "why does the cat sit on the mat and not on the dog?", "go."]


def by_full_passes(engine: LocalEngine, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy generation the obvious way: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(engine.logits([tokens])[0, -1].argmax())
        tokens.append(token)
        if token in engine.default_stop_ids:
            break
    return tokens


def test_greedy_equals_full_passes(engine: LocalEngine) -> None:
    generations = engine.generate(QUESTIONS, max_new_tokens=20, greedy=True)
    for question, generation in zip(QUESTIONS, generations, strict=True):
        prompt = engine.encode_prompt(question)
        assert generation.prompt_length == len(prompt)
        assert generation.tokens == by_full_passes(engine, prompt, 20)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_draws_do_not_depend_on_the_batch(engine: LocalEngine, batch_size: int) -> None:
    prompts = [*QUESTIONS, [0, 3, 9, 9], "so what?"]
    together = engine.generate(prompts, max_new_tokens=30, seed=11, batch_size=batch_size)
    for number in (0, 3, 4):
        (alone,) = engine.generate(
            prompts[number : number + 1], max_new_tokens=30, seed=11, first_number=number
        )
        assert alone == together[number]
    other = engine.generate(prompts, max_new_tokens=30, seed=12, batch_size=batch_size)
    assert all(a.tokens != b.tokens for a, b in zip(together, other, strict=True))


def test_stop_ids_lengths_and_order(engine: LocalEngine) -> None:
    """Sequences that end at different times, so that rows leave the batch."""
    stops = set(range(0, 96, 5))
    prompts = [[0, 3, number] for number in range(40)]
    free = engine.generate(prompts, max_new_tokens=25, seed=1, stop_ids=())
    stopped = engine.generate(prompts, max_new_tokens=25, seed=1, stop_ids=stops)
    assert len({len(g.tokens) for g in stopped}) > 5
    for prompt, whole, generation in zip(prompts, free, stopped, strict=True):
        assert whole.finish_reason == "length"
        assert len(whole.tokens) == 28
        new = whole.tokens[3:]
        end = next((i + 1 for i, token in enumerate(new) if token in stops), None)
        assert generation.tokens == prompt + new[:end]
        assert generation.finish_reason == ("length" if end is None else "stop")


def test_text_and_segments(engine: LocalEngine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    (generation,) = engine.generate(
        ["go"], max_new_tokens=12, seed=2, prefill="hm. </think>", stop_ids=[]
    )
    prompt = engine.encode_prompt("go")
    prefill = tokenizer.encode("hm. </think>")
    assert generation.tokens[: generation.prompt_length] == prompt + prefill
    assert generation.text == tokenizer.decode(generation.tokens[generation.prompt_length :])
    (thinking,) = engine.generate(["go"], max_new_tokens=5, prefill="hm", stop_ids=[])
    assert thinking.segments[: len(prompt) - 2] == [0] * (len(prompt) - 2)
    assert thinking.segments[len(prompt) - 2] == 1  # <think>
    assert len(thinking.segments) == len(thinking.tokens)
    (ended,) = engine.generate(["go"], max_new_tokens=5, stop_ids=range(96))
    assert ended.finish_reason == "stop"
    assert ended.text == ""
    assert len(ended.tokens) == ended.prompt_length + 1


def test_messages_text_and_ids_are_the_same_prompt(engine: LocalEngine) -> None:
    ids = engine.encode_prompt("go")
    generations = engine.generate(
        ["go", [{"role": "user", "content": "go"}], ids, torch.tensor(ids)],  # type: ignore[list-item]  # tensors pass as ids
        max_new_tokens=4,
        greedy=True,
    )
    assert len({tuple(g.tokens) for g in generations}) == 1


def test_generation_ends_with_the_context(engine: LocalEngine) -> None:
    context = engine.context
    prompts = [[3] * (context - 2), [3] * context, [3] * (context - 40)]
    near, full, far = engine.generate(prompts, max_new_tokens=30, stop_ids=[])
    assert (len(near.tokens), len(full.tokens), len(far.tokens)) == (context, context, context - 10)
    assert {g.finish_reason for g in (near, full, far)} == {"length"}


def test_bf16(checkpoint: Path) -> None:
    engine = LocalEngine.from_pretrained(checkpoint)
    generations = engine.generate(QUESTIONS, max_new_tokens=10, stop_ids=[])
    assert [len(g.tokens) - g.prompt_length for g in generations] == [10] * 4
    ids = generations[2].tokens
    residual = engine.residuals([ids], 2)
    assert residual.dtype == torch.bfloat16
    engine = LocalEngine.from_pretrained(checkpoint, fp8="dequantize")
    residual = engine.residuals([ids], 2)
    exact = LocalEngine.from_pretrained(checkpoint, dtype=torch.float32, fp8="dequantize")
    exact = exact.residuals([ids], 2)
    # Rounding sends a token now and then to another expert; most stay where they were.
    error = (residual.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.05
    assert not residual.is_inference()  # may be trained on


def test_residuals_with_lengths(engine: LocalEngine) -> None:
    tokens = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    lengths = [20, 0, 7]
    padded = engine.residuals(tokens, 1, lengths)
    assert padded.shape == (3, 20, engine.config.hidden_size)
    assert padded.isfinite().all()
    assert not padded[1].any()
    assert not padded[2, 7:].any()
    alone = engine.residuals(tokens[2:, :7], 1)
    torch.testing.assert_close(padded[2, :7], alone[0], rtol=1e-5, atol=1e-5)
    assert engine.residuals(torch.zeros(0, 5, dtype=torch.int32), 1).shape == (0, 5, 64)
    assert engine.residuals(torch.zeros(2, 0, dtype=torch.int32), 1).shape == (2, 0, 64)


def test_residuals_stop_after_the_layer(engine: LocalEngine) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a block after the tapped one was run")

    engine.model.layers[2].register_forward_pre_hook(fail)
    engine.residuals([[1, 2, 3]], 1)
    with pytest.raises(AssertionError):
        engine.residuals([[1, 2, 3]], 2)


def test_truncated_engine_gives_the_same_residuals(checkpoint: Path, engine: LocalEngine) -> None:
    truncated = LocalEngine.from_pretrained(
        checkpoint, dtype=torch.float32, last_layer=1, fp8="dequantize"
    )
    tokens = [[1, 2, 3, 4, 5]]
    assert torch.equal(truncated.residuals(tokens, 1), engine.residuals(tokens, 1))
    with pytest.raises(ValueError, match=r"layer 2 was not loaded .*last_layer was 1"):
        truncated.residuals(tokens, 2)
    with pytest.raises(ValueError, match="without last_layer"):
        truncated.generate(["a"])
    with pytest.raises(ValueError, match="without last_layer"):
        truncated.logits(tokens)


@pytest.mark.parametrize("layer", [-1, 4, 37, True, 1.0])
def test_no_such_layer(engine: LocalEngine, layer: int) -> None:
    with pytest.raises(ValueError, match="the model has 0 to 3"):
        engine.residuals([[1, 2]], layer)


def test_bad_prompts(engine: LocalEngine) -> None:
    context = engine.context
    with pytest.raises(ValueError, match=rf"prompt 1: .* {context + 1} tokens.* {context};"):
        engine.generate(["a", [3] * (context + 1)])
    with pytest.raises(ValueError, match=r"prompt 0: .*context is 256"):
        engine.generate(["a" * 400])
    for empty in ("", []):
        with pytest.raises(ValueError, match=r"prompt 0: the prompt is empty"):
            engine.generate([empty])  # type: ignore[list-item]  # a list of nothing
    with pytest.raises(ValueError, match=r"token id 96 is outside the vocabulary \(0 to 95\)"):
        engine.generate([[1, 96]])
    with pytest.raises(ValueError, match="token id -1 is outside"):
        engine.residuals([[1, -1]], 0)
    with pytest.raises(ValueError, match="expected a list of prompts"):
        engine.generate("a question")
    with pytest.raises(ValueError, match="batch_size is 0"):
        engine.generate(["a"], batch_size=0)
    with pytest.raises(TypeError):
        engine.generate([[1.5, 2.0]])  # type: ignore[list-item]  # wrong on purpose
    assert engine.generate([]) == []


def test_bad_batches(engine: LocalEngine) -> None:
    with pytest.raises(ValueError, match="unequal lengths"):
        engine.residuals([[1, 2], [3]], 0)
    with pytest.raises(ValueError, match=r"expected integers \[batch, seq\]"):
        engine.residuals(torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match=r"expected integers \[batch, seq\]"):
        engine.residuals(torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        engine.residuals([[1, 2], [3, 4]], 0, lengths=[1, 1, 1])
    with pytest.raises(ValueError, match="between 0 and 2"):
        engine.residuals([[1, 2]], 0, lengths=[3])
    with pytest.raises(ValueError, match=r"257 tokens.* 256"):
        engine.residuals(torch.zeros(1, 257, dtype=torch.int64), 0)


def test_without_a_tokenizer(engine: LocalEngine) -> None:
    bare = LocalEngine(engine.model)
    assert bare.generate([[0, 3, 9]], max_new_tokens=3)[0].text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.generate(["text"])


def test_fingerprints_tell_checkpoints_apart(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert fingerprint(copy) == fingerprint(checkpoint)
    shard = next(copy.glob("*.safetensors"))
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    shard.write_bytes(changed)
    assert fingerprint(copy) != fingerprint(checkpoint)


def test_checkpoint_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"deepseek_v3"', '"llama"'))
    with pytest.raises(CheckpointError, match="'llama', expected 'deepseek_v3'"):
        LocalEngine.from_pretrained(copy)
    with pytest.raises(FileNotFoundError):
        LocalEngine.from_pretrained(tmp_path / "nowhere")
