"""Harvests: what the rows are, what is refused, and that stopping changes nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.errors import NonFiniteError, ShardError
from r1sae_fast.harvest import HarvestProgress, harvest
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import ActivationBatch, ActivationShards

COLUMNS = ("activations", "tokens", "sequence_id", "position", "segment")
QUICK: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 12, "rows_per_shard": 100}


def prompts(number: int) -> list[str]:
    """Of unequal lengths."""
    return [f"What is {i} plus {i + 1}" + " and more" * (i % 4) + "?" for i in range(number)]


def rows(folder: Path) -> ActivationBatch:
    shards = ActivationShards(folder)
    shards.verify()
    return shards[:]


def assert_same_rows(folder: Path, expected: Path) -> None:
    for name in COLUMNS:
        found, wanted = getattr(rows(folder), name), getattr(rows(expected), name)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), name


def header(folder: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    return line


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()[1:]]


def sequence(batch: ActivationBatch, number: int) -> dict[str, Tensor]:
    here = batch.sequence_id == number
    return {name: getattr(batch, name)[here] for name in COLUMNS}


def test_generated_rows(checkpoint: Path, tmp_path: Path) -> None:
    # In float32, where no rounding turns a token to other experts.
    engine = LocalEngine.from_pretrained(checkpoint, dtype=torch.float32)
    result = harvest(engine, prompts(11), 1, tmp_path / "a", **QUICK)
    generations = engine.generate(prompts(11), max_new_tokens=12, batch_size=4)
    batch = rows(tmp_path / "a")
    assert len(batch) == result.rows == result.new_rows == sum(len(g.tokens) for g in generations)
    assert result.sequences == 11
    assert batch.activations.dtype == torch.bfloat16
    assert batch.sequence_id.tolist() == sorted(batch.sequence_id.tolist())
    for number, generation in enumerate(generations):
        found = sequence(batch, number)
        assert found["tokens"].tolist() == generation.tokens
        assert found["segment"].tolist() == generation.segments
        assert found["position"].tolist() == list(range(len(generation.tokens)))
        expected = engine.residuals([generation.tokens], 1)[0]
        torch.testing.assert_close(found["activations"], expected.bfloat16(), rtol=0.01, atol=0.001)
    assert {0, 1} <= set(batch.segment.tolist()) <= {0, 1, 2}


def test_metadata_and_shards(engine: LocalEngine, tmp_path: Path) -> None:
    harvest(engine, prompts(11), 2, tmp_path / "a", seed=3, dtype="float32", **QUICK)
    first = header(tmp_path / "a")
    assert (first["d"], first["dtype"]) == (64, "float32")
    assert first["metadata"] == {
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "layer": 2,
        "hook_point": "model.layers.2",
        "mode": "generate",
        "engine_dtype": "bfloat16",
        "fp8": "w8a8",
        "batch_size": 4,
        "sampling": {
            "max_new_tokens": 12,
            "temperature": 0.6,
            "top_p": 0.95,
            "seed": 3,
            "greedy": False,
        },
    }
    assert len(engine.fingerprint) == 16
    listed = entries(tmp_path / "a")
    assert len(listed) == 3
    assert [entry["extra"]["sequences"] for entry in listed] == [4, 8, 11]
    # No sequence lies in two shards.
    ids, start = rows(tmp_path / "a").sequence_id, 0
    parts = []
    for entry in listed:
        parts.append(set(ids[start : start + entry["rows"]].tolist()))
        start += entry["rows"]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 11


def test_prefill_of_text_conversations_and_ids(checkpoint: Path, tmp_path: Path) -> None:
    # In float32, where no rounding turns a token to other experts.
    whole = LocalEngine.from_pretrained(checkpoint, dtype=torch.float32)
    engine = LocalEngine.from_pretrained(checkpoint, dtype=torch.float32, last_layer=1)
    tokenizer = engine.require_tokenizer()
    question = {"role": "user", "content": "What is 2 plus 2?"}
    answer = {"role": "assistant", "content": "<think>\nOkay\n</think>\n\n 4."}
    items: list[Any] = [
        "Okay so 2 plus 2 is 4.",
        [question, answer],
        [question],
        torch.tensor([0, 3, 9, 9]),
        "<｜begin▁of▁sentence｜>a<think>b</think>c",
    ]
    harvest(engine, items, 1, tmp_path / "a", mode="prefill", batch_size=2)
    batch = rows(tmp_path / "a")
    found = [sequence(batch, number) for number in range(5)]
    prompt = tokenizer.render([question])
    texts = [
        "<｜begin▁of▁sentence｜>Okay so 2 plus 2 is 4.",
        prompt + "Okay\n</think>\n\n 4.<｜end▁of▁sentence｜>",
        prompt,
        None,
        items[4],
    ]
    for one, text in zip(found, texts, strict=True):
        if text is not None:
            assert tokenizer.decode(one["tokens"].tolist()) == text
        expected = whole.residuals(one["tokens"][None], 1)[0]
        torch.testing.assert_close(one["activations"], expected.bfloat16(), rtol=0.01, atol=0.001)
    assert set(found[0]["segment"].tolist()) == {255}
    inner = tokenizer.encode("\n\n 4.<｜end▁of▁sentence｜>")
    segment = found[1]["segment"].tolist()
    before = tokenizer.encode(prompt).index(tokenizer.think_id)  # type: ignore[arg-type]  # known here
    assert segment == [0] * before + [1] * (len(segment) - before - len(inner)) + [2] * len(inner)
    assert found[4]["segment"].tolist() == [0, 0, 1, 1, 1, 2]
    assert header(tmp_path / "a")["metadata"]["mode"] == "prefill"
    assert "sampling" not in header(tmp_path / "a")["metadata"]


def test_token_budget_ends_with_the_sequence_that_reaches_it(
    engine: LocalEngine, tmp_path: Path
) -> None:
    endless = (f"What is {i} plus 1?" for i in count())
    result = harvest(engine, endless, 1, tmp_path / "a", token_budget=150, **QUICK)
    batch = rows(tmp_path / "a")
    last = int((batch.sequence_id == result.sequences - 1).sum())
    assert len(batch) == result.rows
    assert result.rows - last < 150 <= result.rows
    again = (f"What is {i} plus 1?" for i in count())
    same = harvest(engine, again, 1, tmp_path / "a", token_budget=150, **QUICK)
    assert (same.rows, same.new_rows, same.sequences) == (result.rows, 0, result.sequences)
    more = (f"What is {i} plus 1?" for i in count())
    assert harvest(engine, more, 1, tmp_path / "a", token_budget=151 + last, **QUICK).new_rows > 0


def test_rows_do_not_depend_on_the_shards(engine: LocalEngine, tmp_path: Path) -> None:
    harvest(engine, prompts(9), 1, tmp_path / "a", **QUICK)
    harvest(engine, iter(prompts(9)), 1, tmp_path / "b", **{**QUICK, "rows_per_shard": 10**6})
    assert len(entries(tmp_path / "b")) == 1
    assert_same_rows(tmp_path / "b", tmp_path / "a")


@pytest.mark.parametrize("stop_at", [0, 3, 4, 7, 10])
def test_interrupted_among_the_prompts(engine: LocalEngine, tmp_path: Path, stop_at: int) -> None:
    """ctrl-c while prompts are read: the finished batches are kept, and going on is exact."""

    def interrupted() -> Iterator[str]:
        yield from prompts(stop_at)
        raise KeyboardInterrupt

    settings = {**QUICK, "rows_per_shard": 10**6}
    with pytest.raises(KeyboardInterrupt):
        harvest(engine, interrupted(), 1, tmp_path / "a", **settings)
    kept = entries(tmp_path / "a")
    assert sum(entry["extra"]["sequences"] for entry in kept) == stop_at // 4 * 4
    result = harvest(engine, prompts(11), 1, tmp_path / "a", **settings)
    assert result.sequences == 11
    harvest(engine, prompts(11), 1, tmp_path / "b", **settings)
    assert_same_rows(tmp_path / "a", tmp_path / "b")


def test_interrupted_while_rows_are_written(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a batch that was not finished are dropped, not written twice."""
    real, calls = engine.segments, []

    def interrupting(*args: Any) -> list[int]:
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "segments", interrupting)
        with pytest.raises(KeyboardInterrupt):
            harvest(engine, prompts(11), 1, tmp_path / "a", **QUICK)
    harvest(engine, prompts(11), 1, tmp_path / "a", **QUICK)
    harvest(engine, prompts(11), 1, tmp_path / "b", **QUICK)
    assert_same_rows(tmp_path / "a", tmp_path / "b")


def test_more_prompts_may_follow(engine: LocalEngine, tmp_path: Path) -> None:
    harvest(engine, prompts(4), 1, tmp_path / "a", **QUICK)
    result = harvest(engine, prompts(9), 1, tmp_path / "a", **QUICK)
    assert result.sequences == 9
    assert set(rows(tmp_path / "a").sequence_id.tolist()) == set(range(9))


def test_no_prompts(engine: LocalEngine, tmp_path: Path) -> None:
    assert harvest(engine, [], 1, tmp_path / "a", **QUICK).rows == 0
    assert len(ActivationShards(tmp_path / "a")) == 0


def test_progress(engine: LocalEngine, tmp_path: Path) -> None:
    seen: list[HarvestProgress] = []
    result = harvest(engine, prompts(9), 1, tmp_path / "a", progress=seen.append, **QUICK)
    assert [now.sequences for now in seen] == [4, 8, 9]
    assert seen[-1].rows == result.rows
    assert all(now.rows_per_second > 0 for now in seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"temperature": 0.7}, "temperature was 0.6 and is now 0.7"),
        ({"batch_size": 5}, "batch_size was 4 and is now 5"),
        ({"dtype": "float32"}, "dtype was 'bfloat16' and is now 'float32'"),
        ({"mode": "prefill"}, "mode was 'generate' and is now 'prefill'"),
        ({"layer": 2}, "hook_point was 'model.layers.1' and is now 'model.layers.2'"),
    ],
)
def test_other_settings_are_refused_and_named(
    engine: LocalEngine, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    harvest(engine, prompts(4), 1, tmp_path / "a", **QUICK)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    settings: dict[str, Any] = {"layer": 1, **QUICK, **change}
    layer = settings.pop("layer")
    with pytest.raises(ValueError, match=message):
        harvest(engine, prompts(9), layer, tmp_path / "a", **settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_another_model_or_other_prompts_are_refused(engine: LocalEngine, tmp_path: Path) -> None:
    harvest(engine, prompts(4), 1, tmp_path / "a", **QUICK)
    other = LocalEngine(engine.model, engine.tokenizer, name=engine.name, fingerprint="0" * 16)
    with pytest.raises(ValueError, match="model_fingerprint was"):
        harvest(other, prompts(9), 1, tmp_path / "a", **QUICK)
    for changed in (prompts(9)[1:], prompts(3), ["else", *prompts(9)[1:]]):
        with pytest.raises(ValueError, match="first 4 prompts are not those"):
            harvest(engine, changed, 1, tmp_path / "a", **QUICK)
    with pytest.raises(FileExistsError):
        harvest(engine, prompts(9), 1, tmp_path / "a", resume=False, **QUICK)


def test_a_folder_of_something_else(engine: LocalEngine, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.md"):
        harvest(engine, prompts(2), 1, tmp_path, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "the model has 0 to 2"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"dtype": "int8"}, "int8"),
        ({"prompts": "one text"}, "single text"),
    ],
)
def test_bad_arguments_write_nothing(
    engine: LocalEngine, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"prompts": prompts(2), "layer": 1, **QUICK, **change}
    given, layer = settings.pop("prompts"), settings.pop("layer")
    with pytest.raises(ValueError, match=message):
        harvest(engine, given, layer, tmp_path / "a", **settings)
    assert not (tmp_path / "a").exists()


def test_bad_prompts_are_named_and_cost_nothing(engine: LocalEngine, tmp_path: Path) -> None:
    """The 7th prompt is bad: what was finished before stays, and its number is said."""
    good = prompts(11)
    unbounded = {name: value for name, value in QUICK.items() if name != "rows_per_shard"}
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for number, (bad, mode, message) in enumerate(
        (
            ([0] * 161, "generate", r"prompt 6: .*161 tokens.* 160"),
            ("", "generate", "prompt 6: the prompt is empty"),
            ([], "prefill", "prompt 6: the prompt is empty"),
            ("", "prefill", "prompt 6: the text is empty"),
            ([512], "prefill", "prompt 6: token id 512"),
            (answered, "generate", "prompt 6 has a response already"),
            ([{"role": "user"}], "prefill", "prompt 6: message 0 has content None"),
        )
    ):
        folder = tmp_path / str(number)
        given: list[Any] = [*good[:6], bad, *good[7:]]
        with pytest.raises(ValueError, match=message):
            harvest(engine, given, 1, folder, mode=mode, **unbounded)  # type: ignore[arg-type]  # a str
        assert [entry["extra"]["sequences"] for entry in entries(folder)] == [4]
        result = harvest(engine, good, 1, folder, mode=mode, **QUICK)  # type: ignore[arg-type]  # a str
        assert result.sequences == 11


class _Stopped(Exception):
    pass


def fails_at(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, but for the call of that number."""
    calls = count(1)

    def function(*args: Any) -> Any:
        if next(calls) == number:
            raise _Stopped
        return real(*args)

    return function


@pytest.mark.parametrize("place", ["prompts", "progress", "model"])
def test_any_error_keeps_the_finished_batches(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """With shards of the default size, which the prompts don't fill; going on is exact."""
    settings = {name: value for name, value in QUICK.items() if name != "rows_per_shard"}
    given, progress = iter(prompts(11)), None
    with monkeypatch.context() as patch:
        if place == "prompts":
            given = map(fails_at(10, str), given)
        elif place == "progress":
            progress = fails_at(2, print)
        else:
            patch.setattr(engine, "residuals", fails_at(3, engine.residuals))
        with pytest.raises(_Stopped):
            harvest(engine, given, 1, tmp_path / "a", progress=progress, **settings)
    assert [entry["extra"]["sequences"] for entry in entries(tmp_path / "a")] == [8]
    result = harvest(engine, prompts(11), 1, tmp_path / "a", **settings)
    assert result.sequences == 11
    harvest(engine, prompts(11), 1, tmp_path / "b", **settings)
    assert_same_rows(tmp_path / "a", tmp_path / "b")


def test_a_shard_that_cannot_be_written_is_not_tried_twice(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def full_disk(*args: object) -> None:
        calls.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_core, "write_shard", full_disk)
        with pytest.raises(OSError, match="no room for a shard"):
            harvest(engine, prompts(9), 1, tmp_path / "a", **{**QUICK, "rows_per_shard": 1})
    assert len(calls) == 1
    assert entries(tmp_path / "a") == []
    assert harvest(engine, prompts(9), 1, tmp_path / "a", **QUICK).sequences == 9


def test_not_finite_residuals_name_the_sequence(engine: LocalEngine, tmp_path: Path) -> None:
    tokenizer = engine.require_tokenizer()
    engine.model.embed_tokens.weight.data[tokenizer.encode(" 77")] = torch.nan
    given = ["What is 1 plus 2?", "What is 3 plus 4?", "What is 5 plus 77?"]
    with pytest.raises(NonFiniteError, match=r"layer 1 of sequence 2 "):
        harvest(engine, given, 1, tmp_path / "a", mode="prefill")


def test_two_harvests_into_one_folder(engine: LocalEngine, tmp_path: Path) -> None:
    def nested() -> Iterator[str]:
        yield from prompts(2)
        with pytest.raises(ShardError):
            harvest(engine, prompts(3), 1, tmp_path / "a", **QUICK)
        yield from prompts(1)

    assert harvest(engine, nested(), 1, tmp_path / "a", **QUICK).sequences == 3


def test_truncated_engine_cannot_generate(checkpoint: Path, tmp_path: Path) -> None:
    engine = LocalEngine.from_pretrained(checkpoint, last_layer=1)
    with pytest.raises(ValueError, match="without last_layer"):
        harvest(engine, prompts(2), 1, tmp_path / "a", **QUICK)
    assert not (tmp_path / "a").exists()


def test_same_prompts_as_a_list_or_a_stream(engine: LocalEngine, tmp_path: Path) -> None:
    stream = islice((f"What is {i}?" for i in count()), 5)
    harvest(engine, stream, 1, tmp_path / "a", **QUICK)
    harvest(engine, [f"What is {i}?" for i in range(5)], 1, tmp_path / "b", **QUICK)
    assert_same_rows(tmp_path / "a", tmp_path / "b")
