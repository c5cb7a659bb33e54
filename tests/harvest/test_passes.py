"""Engines that want many batches at a time: shards may end within a pass, and runs stop there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import ActivationShards

PROMPTS = [f"What is {i} plus {i + 1}" + " and more" * (i % 4) + "?" for i in range(23)]
SETTINGS: dict[str, Any] = {"batch_size": 3, "mode": "prefill", "rows_per_shard": 25}
COLUMNS = ("activations", "tokens", "sequence_id", "position", "segment")


class PassEngine(LocalEngine):
    """Asks for passes of 80 tokens, and may be stopped after so many batches."""

    pass_tokens = 80
    stop_after: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes: list[tuple[int, int, str]] = []
        self.commits = 0

    def rows(
        self, sequences: Sequence[Sequence[int]], layer: int, *, batch_size: int, skip: int = 0
    ) -> Iterator[tuple[int, Tensor]]:
        self.passes.append((len(sequences), skip, str(sequences[0])))
        for number, chunk in enumerate(
            super().rows(sequences, layer, batch_size=batch_size, skip=skip), skip // batch_size
        ):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield chunk

    def committed(self) -> None:
        self.commits += 1


@pytest.fixture
def pass_engine(checkpoint: Path) -> PassEngine:
    engine = PassEngine.from_pretrained(checkpoint, last_layer=1)
    assert isinstance(engine, PassEngine)
    return engine


def assert_same_rows(folder: Path, expected: Path) -> None:
    found, wanted = ActivationShards(folder), ActivationShards(expected)
    found.verify()
    for name in COLUMNS:
        assert torch.equal(getattr(found[:], name), getattr(wanted[:], name)), name


def extras(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "manifest.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["extra"] for line in lines]


def test_passes_are_whole_batches(
    pass_engine: PassEngine, engine: LocalEngine, tmp_path: Path
) -> None:
    harvest(pass_engine, iter(PROMPTS), 1, tmp_path / "a", **SETTINGS)
    harvest(engine, PROMPTS, 1, tmp_path / "b", **SETTINGS)
    assert_same_rows(tmp_path / "a", tmp_path / "b")
    assert len(pass_engine.passes) > 2
    assert all(count % 3 == 0 for count, _, _ in pass_engine.passes[:-1])
    # Each pass is on the disk before the next one begins, and shards end within it.
    assert pass_engine.commits == len(pass_engine.passes)
    assert any("pass" in extra for extra in extras(tmp_path / "a"))
    assert len(extras(tmp_path / "a")) > len(pass_engine.passes)


@pytest.mark.parametrize("token_budget", [None, 150])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_stopped_within_a_pass(
    pass_engine: PassEngine,
    engine: LocalEngine,
    tmp_path: Path,
    stop_after: int,
    token_budget: int | None,
) -> None:
    """Again and again, after each time a batch or more: the same passes are formed, what is done
    of them is left out, and the rows are those of an undisturbed run."""
    settings = {**SETTINGS, "token_budget": token_budget}
    undisturbed = PassEngine(engine.model, engine.tokenizer, name=engine.name)
    undisturbed.fingerprint = engine.fingerprint
    harvest(undisturbed, PROMPTS, 1, tmp_path / "b", **settings)
    formed = {(count, first) for count, _, first in undisturbed.passes}
    for number in range(40):
        pass_engine.stop_after = stop_after + 4 * (number % 2)
        try:
            harvest(pass_engine, PROMPTS, 1, tmp_path / "a", **settings)
            break
        except KeyboardInterrupt:
            continue
    else:
        raise AssertionError("no run came to the end")
    assert number > 0
    assert {(count, first) for count, _, first in pass_engine.passes} == formed
    assert any(skip > 0 for _, skip, _ in pass_engine.passes)
    assert_same_rows(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("pass_tokens", [0, 20, 40])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_another_engine_goes_on_with_smaller_passes(
    pass_engine: PassEngine,
    engine: LocalEngine,
    tmp_path: Path,
    stop_after: int,
    pass_tokens: int,
) -> None:
    """Where its passes end on what is done, too: that is no end of the prompts."""
    pass_engine.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        harvest(pass_engine, PROMPTS, 1, tmp_path / "a", **SETTINGS)
    pass_engine.stop_after, pass_engine.pass_tokens = None, pass_tokens
    assert harvest(pass_engine, PROMPTS, 1, tmp_path / "a", **SETTINGS).sequences == len(PROMPTS)
    harvest(engine, PROMPTS, 1, tmp_path / "b", **SETTINGS)
    assert_same_rows(tmp_path / "a", tmp_path / "b")
