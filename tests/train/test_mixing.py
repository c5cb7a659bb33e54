"""EngineRows: each row once, in a seeded order, in bounded memory, resumed to the bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.shards import ActivationBatch
from r1sae_fast.train import EngineRows, TrainConfig, train
from r1sae_fast.train.buffer_file import FILES
from r1sae_fast.train.mixing import MixingLoader


class Counting(Engine):
    """A model whose residual of token t at place p of a text is (t, p)."""

    name, fingerprint, tokenizer = "counting", "0", None
    hidden_size, num_layers, vocab_size, context, eos_id = 2, 1, 1 << 20, 1 << 20, 0
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.most_rows = self.texts = 0

    def describe(self) -> dict[str, Any]:
        return {"engine": "counting"}

    def residuals(self, tokens: Tensor, layer: int, lengths: Tensor | None = None) -> Tensor:
        self.texts += len(tokens)
        self.most_rows = max(self.most_rows, tokens.numel())
        return torch.stack([tokens, torch.arange(tokens.shape[1]).expand_as(tokens)], -1).float()

    def width_of(self, batch: Sequence[Sequence[int]]) -> int:
        return max(map(len, batch))


def texts(lengths: Sequence[int]) -> list[list[int]]:
    """Texts of tokens that are all different."""
    numbers = iter(range(sum(lengths)))
    return [list(islice(numbers, length)) for length in lengths]


def seen(batches: Sequence[ActivationBatch]) -> list[int]:
    """The tokens of rows, each checked to be the row of its token."""
    for batch in batches:
        assert torch.equal(batch.activations[:, 0], batch.tokens.float())
        assert torch.equal(batch.activations[:, 1], batch.position.float())
    return [int(token) for batch in batches for token in batch.tokens]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    buffer_rows=st.integers(40, 90),
    batch_rows=st.integers(1, 20),
    sequences=st.integers(1, 7),
    seed=st.integers(0, 2**63),
)
@settings(deadline=None)
def test_each_row_comes_once(
    lengths: list[int], buffer_rows: int, batch_rows: int, sequences: int, seed: int
) -> None:
    given_texts = texts(lengths)
    engine = Counting()
    rows = EngineRows(engine, given_texts, 0, buffer_rows=buffer_rows, batch_size=sequences)
    loader = rows.loader(batch_rows, seed=seed)
    first = list(loader)
    assert sorted(seen(first)) == list(range(sum(lengths)))
    assert all(len(batch) == batch_rows for batch in first[:-1])
    for batch in first:
        for token, number in zip(batch.tokens, batch.sequence_id, strict=True):
            assert int(token) in given_texts[int(number)]
    assert sorted(seen(list(loader))) == list(range(sum(lengths)))  # the second epoch
    # No more was held than the buffer, in one tensor a column, and one batch of texts was run.
    assert loader._buffer is not None
    assert {len(column) for column in loader._buffer.values()} == {buffer_rows}
    assert engine.most_rows <= sequences * max(lengths)


def test_orders_differ_by_seed_and_epoch_and_mix() -> None:
    rows = EngineRows(Counting(), texts([10] * 100), 0, buffer_rows=400, batch_size=4)
    orders = [seen(list(rows.loader(50, seed=seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    both = rows.loader(50, seed=0)
    assert seen(list(both)) != seen(list(both))
    # Filled with 400 rows, it gives 200 of them before it takes others.
    assert max(orders[0][:200]) < 400
    # A batch has rows of many texts: unmixed it would be 5 (the seed is fixed, so this is no draw).
    assert len({token // 10 for token in orders[0][:50]}) >= 20


@given(stop=st.integers(0, 70), batch_rows=st.integers(1, 12), further=st.integers(1, 12))
@settings(deadline=None)
def test_a_loader_goes_on_to_the_bit(
    stop: int, batch_rows: int, further: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("buffers")
    rows = EngineRows(
        Counting(), texts([3, 9, 1, 12, 5, 5, 2] * 6), 0, buffer_rows=30, batch_size=3
    )

    def some(loader: MixingLoader, count: int) -> list[int]:
        return seen(list(islice(iter(loader), count)))

    whole = rows.loader(batch_rows, seed=3, epochs=None)
    some(whole, stop)
    state = json.loads(json.dumps(whole.state_dict()))
    whole.save_buffer(folder)
    whole.drop_other_buffers(folder)
    resumed = rows.loader(batch_rows, seed=3, epochs=None)
    resumed.load_state_dict(state, folder)
    assert some(resumed, further) == some(whole, further)
    assert len(list(folder.iterdir())) <= 1


def test_what_was_drawn_first_is_not_run_again() -> None:
    engine = Counting()
    rows = EngineRows(engine, texts([10] * 30), 0, buffer_rows=100, batch_size=4)
    drawn = rows.draw(60, 5)
    ran = engine.texts
    loader = rows.loader(20, seed=5)
    batches = iter(loader)
    first = [next(batches) for _ in range(2)]
    assert engine.texts == ran
    assert seen(first) == seen([drawn])[:40]
    assert rows.loader(20, seed=5) is not loader


def test_bad_input(tmp_path: Path) -> None:
    engine = Counting()
    with pytest.raises(ValueError, match="layer 1 does not exist"):
        EngineRows(engine, [], 1)
    with pytest.raises(FileNotFoundError, match="none"):
        EngineRows(engine, tmp_path / "none.txt", 0)
    with pytest.raises(TypeError, match="texts are int"):
        EngineRows(engine, 3, 0)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"buffer_rows is 2\.5"):
        EngineRows(engine, [], 0, buffer_rows=2.5)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="batch_size is 0"):
        EngineRows(engine, [], 0, batch_size=0)
    rows = EngineRows(engine, texts([4, 11]), 0, buffer_rows=20)
    with pytest.raises(ValueError, match="batch of 11 rows from a buffer of 20"):
        rows.loader(11)
    with pytest.raises(ValueError, match="come shuffled"):
        rows.loader(2, shuffle=False)
    with pytest.raises(ValueError, match="text 1 has 11 tokens, more than half"):
        next(iter(rows.loader(2)))
    with pytest.raises(ValueError, match="no texts to train on"):
        next(iter(EngineRows(engine, [], 0).loader(2)))
    few = EngineRows(engine, texts([3]), 0, buffer_rows=20).loader(4, drop_last=True, epochs=None)
    with pytest.raises(ValueError, match="make 3 rows, fewer than a batch of 4"):
        next(iter(few))


def test_a_state_of_something_else(tmp_path: Path) -> None:
    def fresh(lengths: Sequence[int], size: int = 40, seed: int = 0) -> MixingLoader:
        rows = EngineRows(Counting(), texts(lengths), 0, buffer_rows=size, batch_size=2)
        return rows.loader(4, seed=seed)

    loader = fresh([5] * 20)
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(CheckpointError, match="buffer is missing or damaged"):
        fresh([5] * 20).load_state_dict(state, tmp_path)
    path = loader.save_buffer(tmp_path)
    with pytest.raises(ValueError, match="has fingerprint"):
        fresh([5] * 20, 44).load_state_dict(state, tmp_path)
    with pytest.raises(ValueError, match="has seed 0, this loader 1"):
        fresh([5] * 20, seed=1).load_state_dict(state, tmp_path)
    with pytest.raises(ValueError, match="it has no 'checksum'"):
        fresh([5] * 20).load_state_dict(
            {key: value for key, value in state.items() if key != "checksum"}, tmp_path
        )
    for other, words in (([4] * 20, "other texts"), ([5] * 3, "only 3 texts")):
        resumed = fresh(other)
        resumed.load_state_dict(state, tmp_path)
        with pytest.raises(ValueError, match=words):
            list(resumed)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="buffer is missing or damaged"):
        fresh([5] * 20).load_state_dict(state, tmp_path)


CONFIG = TrainConfig(d_sae=64, k=4, tokens=3000, batch_size=100, learning_rate=1e-2, seed=3)
PROMPTS = [f"{a} plus {b}" for a in range(10) for b in range(12)]


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32, last_layer=1)


PROGRAM = r"""
import os, signal, sys, torch
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.train import EngineRows, TrainConfig, train
prompts = [f"{a} plus {b}" for a in range(10) for b in range(12)]
config = TrainConfig(d_sae=64, k=4, tokens=3000, batch_size=100, learning_rate=1e-2, seed=3)
engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32, last_layer=1)
rows = EngineRows(engine, prompts, 1, buffer_rows=300, batch_size=8)
for lines in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        seen = 0
        def count(_):
            global seen
            seen += 1
            if seen == lines:
                os.kill(os.getpid(), signal.SIGKILL)
        torch.set_num_threads(1)
        train(rows, sys.argv[1], config, log_every=2, checkpoint_seconds=0, progress=False,
              on_metrics=count)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    def run(folder: str, *lines: int) -> list[int]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / folder), *map(str, lines)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return [int(word) for word in done.stdout.split()]

    # A line comes before its checkpoint: the first kill leaves none.
    assert run("killed", 1, 3, 2, 5, 4, 0) == [-signal.SIGKILL] * 5 + [0]
    assert run("undisturbed", 0) == [0]
    expected, found = (
        FastSAE.load(tmp_path / folder).state_dict() for folder in ("undisturbed", "killed")
    )
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert len(list((tmp_path / "killed").glob(FILES))) == 1


def test_an_engine_in_place_of_shards(engine: LocalEngine, tmp_path: Path) -> None:
    rows = EngineRows(engine, PROMPTS, 1, buffer_rows=300, batch_size=8)
    sae = train(rows, tmp_path / "sae", CONFIG, progress=False)
    assert sae.d_in == engine.hidden_size
    assert sae.metadata["activations"]["hook_point"] == "model.layers.1"
    assert sae.metadata["activations"]["buffer_rows"] == 300
    text = (tmp_path / "sae" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[-1]["tokens"] + lines[-1]["left_out"] == 3000
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    other = EngineRows(engine, PROMPTS, 1, buffer_rows=400, batch_size=8)
    with pytest.raises(ValueError, match="started with shards ="):
        train(other, tmp_path / "sae", CONFIG, progress=False)
