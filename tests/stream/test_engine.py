"""The streaming engine's rows are the resident engine's, to the bit, whatever way they are run."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1sae_fast.errors import ShardError
from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.blocks import Fp8Mode
from r1sae_fast.r1.engines.stream import StreamEngine, StreamProgress
from r1sae_fast.r1.stream.plan import Budget, Model, Shape, StreamPlan, candidates, count_chunks
from r1sae_fast.r1.stream.speeds import Speeds

SPEEDS = Speeds(disk=1e9, flops=1e11, expert_flops=1e11, dequantize=1e9)


LAYER, BATCH = 3, 4


class Forced(StreamEngine):
    """Runs the one way that it is told."""

    way = 0

    def plan(self, shape: Shape, layer: int, *, in_memory: bool | None = None) -> StreamPlan:
        """The ``way``-th candidate, its experts in chunks of a few batches."""
        model = Model(self.config, layer, self.fp8, self.dtype.itemsize, self._reader.is_fp8)
        plan = list(candidates(model, shape, Budget(None, 0)))[self.way]
        if plan.group is None:
            return plan
        chunk = 2 * shape.largest
        chunks = count_chunks(shape.batches, chunk)
        return dataclasses.replace(plan, chunk_rows=chunk, chunks=chunks)


def rows(
    engine: StreamEngine | LocalEngine, sequences: list[list[int]], skip: int = 0
) -> list[tuple[int, Tensor]]:
    return list(engine.rows(sequences, LAYER, batch_size=BATCH, skip=skip))


def assert_same(found: list[tuple[int, Tensor]], expected: list[tuple[int, Tensor]]) -> None:
    assert [count for count, _ in found] == [count for count, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("fp8", "dtype"), [("w8a8", torch.bfloat16), ("dequantize", torch.float32)]
)
def test_every_way_gives_the_resident_engines_bits(
    checkpoint: Path,
    sequences: list[list[int]],
    tmp_path: Path,
    fp8: Fp8Mode,
    dtype: torch.dtype,
) -> None:
    expected = rows(LocalEngine.from_pretrained(checkpoint, dtype, fp8=fp8), sequences)
    with Forced(checkpoint, dtype, fp8=fp8, scratch=tmp_path / "scratch", speeds=SPEEDS) as engine:
        ways = set()
        for way in itertools.count():
            engine.way = way
            try:
                plan = engine.plan(Shape(1, ((4, 60),)), LAYER)
            except IndexError:
                break
            ways.add((plan.group, plan.ahead, plan.weight_cache))
            assert_same(rows(engine, sequences), expected)
            engine.committed()
    groups = {group for group, _, _ in ways}
    assert {None, 1, 8} <= groups
    caches = 2 if fp8 == "w8a8" else 1
    assert len(ways) == len(groups) * 2 * caches
    assert not (tmp_path / "scratch").exists()


def test_hidden_states_in_memory(checkpoint: Path, sequences: list[list[int]]) -> None:
    expected = rows(LocalEngine.from_pretrained(checkpoint), sequences)
    with StreamEngine(checkpoint, speeds=SPEEDS) as engine:
        assert_same(rows(engine, sequences), expected)
        assert engine.describe() == LocalEngine.from_pretrained(checkpoint).describe()


def test_residuals_of_one_batch(checkpoint: Path) -> None:
    ids = torch.randint(3, 500, (3, 30), generator=torch.Generator().manual_seed(5))
    lengths = [30, 1, 17]
    with StreamEngine(checkpoint, torch.float32, speeds=SPEEDS) as engine:
        found = engine.residuals(ids, LAYER, lengths)
        assert engine.residuals(ids[:0], 0).shape == (0, 30, 64)
    expected = LocalEngine.from_pretrained(checkpoint, torch.float32)
    assert torch.equal(found, expected.residuals(ids, LAYER, lengths))


def test_tiny_r1_with_few_tokens(tmp_path: Path) -> None:
    """Its experts are few: the resident engine runs all of them on batches of a few tokens."""
    sequences = [[3, 4, 5, 6], [7, 8], [9]]
    expected = rows(LocalEngine.from_pretrained("tiny-r1"), sequences)
    with StreamEngine("tiny-r1", scratch=tmp_path / "s", max_memory=10**10) as engine:
        assert_same(rows(engine, sequences), expected)


@pytest.mark.parametrize("after", [0, 5, 6, 7, 11, 12, 13, 18, 20])
def test_goes_on_from_the_last_finished_block(
    checkpoint: Path, sequences: list[list[int]], tmp_path: Path, after: int
) -> None:
    expected = rows(LocalEngine.from_pretrained(checkpoint), sequences)
    per_block = len(expected)

    class Killed(Exception):
        pass

    def stop(now: StreamProgress) -> None:
        seen.append(now)
        if len(seen) > after:
            raise Killed

    seen: list[StreamProgress] = []
    engine = StreamEngine(checkpoint, scratch=tmp_path / "s", speeds=SPEEDS, on_progress=stop)
    with engine, pytest.raises(Killed):
        rows(engine, sequences)
    # What came out before the end is of the last block; rows that were yielded may be skipped.
    yielded = max(after + 1 - LAYER * per_block, 0)
    seen.clear()
    with StreamEngine(
        checkpoint, scratch=tmp_path / "s", speeds=SPEEDS, on_progress=seen.append
    ) as again:
        found = rows(again, sequences, skip=yielded * BATCH)
    assert_same(found, expected[yielded:])
    assert seen[0].block == after // per_block


def test_another_pass_does_not_go_on(
    checkpoint: Path, sequences: list[list[int]], tmp_path: Path
) -> None:
    changed = [*sequences[:-1], [4, *sequences[-1][1:]]]
    expected = rows(LocalEngine.from_pretrained(checkpoint), changed)
    with StreamEngine(checkpoint, scratch=tmp_path / "s", speeds=SPEEDS) as engine:
        rows(engine, sequences)  # not committed
    with StreamEngine(checkpoint, scratch=tmp_path / "s", speeds=SPEEDS) as engine:
        assert_same(rows(engine, changed), expected)
        engine.committed()
    assert not (tmp_path / "s").exists()


def test_hidden_states_of_fewer_rows_do_not_serve_more(
    checkpoint: Path, sequences: list[list[int]], tmp_path: Path
) -> None:
    expected = rows(LocalEngine.from_pretrained(checkpoint), sequences)
    for skip in (8, 16, 0):
        with StreamEngine(checkpoint, scratch=tmp_path / "s", speeds=SPEEDS) as engine:
            assert_same(rows(engine, sequences, skip), expected[skip // BATCH :])


def test_a_cap_too_small_names_one_that_does(checkpoint: Path, sequences: list[list[int]]) -> None:
    with StreamEngine(checkpoint, max_memory=1000, speeds=SPEEDS) as engine:
        base = engine._base
        with pytest.raises(ValueError, match=r"at least \d+MB is needed for batches of 4") as error:
            rows(engine, sequences)
    least = int(str(error.value).split("at least ")[1].split("MB")[0]) * 10**6
    # The process has grown meanwhile, by however much the tests before this one had not loaded.
    with StreamEngine(checkpoint, max_memory=least + 50 * 10**6, speeds=SPEEDS) as engine:
        engine._base = base
        assert len(rows(engine, sequences)) == 6


def test_a_run_killed_behind_its_last_shard_leaves_nothing(
    checkpoint: Path, sequences: list[list[int]], tmp_path: Path
) -> None:
    """Between the last shard and the end of the pass's hidden states."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"

    class Killed(Exception):
        pass

    class Last(StreamEngine):
        def committed(self) -> None:
            raise Killed

    def run(kind: type[StreamEngine], scratch: Path) -> None:
        with kind(checkpoint, scratch=scratch, speeds=SPEEDS) as engine:
            harvest(engine, sequences, LAYER, out, mode="prefill", batch_size=BATCH)

    with pytest.raises(Killed):
        run(Last, out / ".stream")
    assert (out / ".stream" / "state.json").exists()
    run(StreamEngine, elsewhere)
    assert (out / ".stream" / "state.json").exists()
    run(StreamEngine, out / ".stream")
    assert not (out / ".stream").exists()
    # A folder that others may use is left alone.
    shutil.rmtree(out)
    with pytest.raises(Killed):
        run(Last, elsewhere)
    run(StreamEngine, elsewhere)
    assert (elsewhere / "state.json").exists()


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    with StreamEngine(checkpoint, speeds=SPEEDS, scratch=tmp_path / "s") as engine:
        with pytest.raises(ValueError, match="layer 5 does not exist"):
            list(engine.rows([[1]], 5, batch_size=1))
        with pytest.raises(ValueError, match="reads texts"):
            engine.check_head()
        with pytest.raises(ValueError, match="expected 2 axes"):
            engine.residuals(torch.zeros(3, dtype=torch.int64), 0)
        with pytest.raises(ValueError, match="lengths is"):
            engine.residuals(torch.zeros(1, 3, dtype=torch.int64), 0, [4])
        list(engine.rows([[1, 2]], 2, batch_size=1))
        with (
            StreamEngine(checkpoint, speeds=SPEEDS, scratch=tmp_path / "s") as other,
            pytest.raises(ShardError, match="another"),
        ):
            list(other.rows([[1, 2]], 2, batch_size=1))
    with pytest.raises(ValueError, match="max_memory is 0"):
        StreamEngine(checkpoint, max_memory=0)
    with pytest.raises(ValueError, match="fp8 is 'other'"):
        StreamEngine(checkpoint, fp8="other")  # type: ignore[arg-type]  # wrong on purpose


def test_a_damaged_shard_is_named_and_nothing_hangs(
    checkpoint: Path, sequences: list[list[int]], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    with StreamEngine(broken, speeds=SPEEDS) as engine:
        (broken / engine._reader.shards["model.layers.2.input_layernorm.weight"]).unlink()
        with pytest.raises(FileNotFoundError, match="missing"):
            rows(engine, sequences)
