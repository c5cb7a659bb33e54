"""Plans: their parts add up, they fit or say what would, and they know R1's numbers."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.r1 import R1Config
from r1sae_fast.r1.blocks import empty_block
from r1sae_fast.r1.layout import block_specs, model_specs
from r1sae_fast.r1.stream.arithmetic import (
    dense_bytes,
    kept_bytes,
    model_bytes,
    stored_bytes,
    work,
)
from r1sae_fast.r1.stream.explain import plan_lines
from r1sae_fast.r1.stream.outlook import Gpus, Machine, Task, on_gpus, resident, streaming
from r1sae_fast.r1.stream.plan import (
    Budget,
    Model,
    Shape,
    candidates,
    make_plan,
    r1_is_fp8,
    split_chunks,
)
from r1sae_fast.r1.stream.speeds import Speeds
from r1sae_fast.r1.weights import CheckpointReader

R1 = R1Config()
SPEEDS = Speeds(disk=2e9, flops=1e12, expert_flops=8e11, dequantize=2e9)
GIB = 2**30


def shape(batches: int = 16, sequences: int = 1, length: int = 4096) -> Shape:
    return Shape(batches * sequences * length, ((sequences, length),) * batches)


def test_r1s_numbers() -> None:
    """The published ones: 671 B parameters, 37 B of them active (embedding and head counted)."""
    assert stored_bytes(model_specs(R1)) == 673_150_611_808
    assert model_bytes(R1, 37) == 406_522_447_168
    part, whole = work(R1, 37, 4096), work(R1, 60, 4096)
    assert part.weights == 22_235_971_584
    assert whole.weights + 2 * 129280 * 7168 == pytest.approx(37.5e9, rel=0.01)
    assert part.flops / whole.flops == pytest.approx(0.62, abs=0.005)
    # 128 heads, queries and keys of 192, values of 128, 2048.5 keys on average.
    assert part.attention == 38 * 2 * 128 * (192 + 128) * 2048.5


def test_stored_bytes_are_those_on_disk(checkpoint) -> None:  # type: ignore[no-untyped-def]  # a fixture
    with CheckpointReader(checkpoint) as reader:
        config = R1Config.from_dict(reader.config)
        for index in range(config.num_hidden_layers):
            specs = list(block_specs(config, index))
            names = [spec.name for spec in specs]
            names += [spec.scale_name for spec in specs if spec.quantised]
            on_disk = sum(reader.entry(name).nbytes for name in names)
            assert stored_bytes(specs) == on_disk


@pytest.mark.parametrize("fp8", ["w8a8", "dequantize"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_bytes_are_those_of_a_block(checkpoint, fp8, dtype) -> None:  # type: ignore[no-untyped-def]  # fixtures
    with CheckpointReader(checkpoint) as reader:
        config = R1Config.from_dict(reader.config)
        for index in (0, 3):
            block = empty_block(reader, config, index, dtype=dtype, device="meta", fp8=fp8)
            specs = list(block_specs(config, index))
            expected = sum(tensor.nbytes for tensor in block.state_dict().values())
            assert kept_bytes(specs, fp8, dtype.itemsize, reader.is_fp8) == expected
            fp8_weights = sum(
                tensor.numel()
                for tensor in block.state_dict().values()
                if tensor.dtype == torch.float8_e4m3fn
            )
            found = dense_bytes(specs, fp8, dtype.itemsize, reader.is_fp8)
            assert found == fp8_weights * dtype.itemsize


@given(
    cap=st.integers(2 * GIB, 80 * GIB),
    sequences=st.integers(1, 4),
    length=st.integers(1, 2048),
    fp8=st.sampled_from(["w8a8", "dequantize"]),
    in_memory=st.booleans(),
)
def test_a_plan_fits_or_says_what_would(
    cap: int, sequences: int, length: int, fp8: str, in_memory: bool
) -> None:
    model = Model(R1, 37, fp8)
    work_ = shape(8, sequences, length)
    budget = Budget(cap, 300 << 20, hidden_in_memory=in_memory)
    try:
        plan = make_plan(model, work_, budget, SPEEDS)
    except ValueError as error:
        needed = int(re.search(r"at least (\d+)MB", str(error))[1]) * 10**6  # type: ignore[index]  # found
        assert needed > cap
        budget = Budget(needed, 300 << 20, hidden_in_memory=in_memory)
        assert make_plan(model, work_, budget, SPEEDS).peak <= needed
        return
    assert plan.peak == sum(plan.memory.values()) <= cap
    assert plan.read >= model_bytes(R1, 37) - 2**20
    assert plan.seconds["whole"] >= max(plan.seconds["disk"], plan.seconds["compute"])
    text = "\n".join(plan_lines(plan))
    assert "tokens/s" in text


def test_more_memory_is_never_slower() -> None:
    model = Model(R1, 37)
    caps = [6, 8, 12, 16, 24, 32, 48, 64, 96]
    rates = [
        make_plan(model, shape(), Budget(cap * GIB, 2**28), SPEEDS).tokens_per_second
        for cap in caps
    ]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_ways_by_memory() -> None:
    model = Model(R1, 37, kernels=True)
    fast = Speeds(disk=7e9, flops=2e14, expert_flops=2e14, dequantize=1e12)
    large = make_plan(model, shape(64), Budget(64 * GIB, 2**28), fast)
    assert (large.group, large.ahead, large.chunks) == (None, True, 1)
    small = make_plan(model, shape(64), Budget(8 * GIB, 2**28), fast)
    assert small.group is not None
    assert small.group < 256
    assert small.read == pytest.approx(model_bytes(R1, 37) * small.chunks, rel=0.1)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 50)), min_size=1, max_size=20),
    rows=st.integers(1, 400),
)
def test_chunks_cover_all_batches_in_order(sizes: list[tuple[int, int]], rows: int) -> None:
    chunks = split_chunks(sizes, rows)
    assert [number for chunk in chunks for number in chunk] == list(range(len(sizes)))
    for chunk in chunks:
        total = sum(sizes[number][0] * sizes[number][1] for number in chunk)
        assert total <= rows or len(chunk) == 1


def test_every_way_reads_the_weights_at_least_once() -> None:
    for plan in candidates(Model(R1, 37), shape(4), Budget(16 * GIB, 2**28)):
        assert plan.read >= model_bytes(R1, 37) * 0.999
        assert plan.peak == sum(plan.memory.values())


def test_outlook() -> None:
    task = Task(R1, r1_is_fp8, 37)
    small = Machine(memory=24 * GIB, disk=3e9, flops=80e12)
    assert resident(task, small).tokens_per_second is None
    flops = work(R1, 37, 4096).flops
    streamed = streaming(task, small).tokens_per_second
    assert streamed is not None
    assert 0 < streamed <= 80e12 / flops
    large = Machine(memory=500 * 10**9, disk=3e9, flops=80e12)
    assert resident(task, large).tokens_per_second == pytest.approx(80e12 / flops)
    assert resident(task, large).days(1e9) == pytest.approx(1e9 * flops / 80e12 / 86400)
    rate = on_gpus(task, Gpus()).tokens_per_second
    assert rate == pytest.approx(8 * 1979e12 * 0.09 / flops)
    # Eight of 40 GB do not hold 406 GB.
    assert on_gpus(task, Gpus(memory=40 * 10**9)).limit == "memory"
    assert streaming(task, Machine(10**9, 3e9, 1e12)).limit == "memory"


def test_every_form_of_a_batch_takes_memory_for_its_products() -> None:
    budget = Budget(None, 0)
    lengths = tuple((1, 512 + 64 * at) for at in range(8))
    one, many = (Shape(8192, batches) for batches in (((1, 960),) * 8, lengths))
    model = Model(R1, 37)
    few, more = (make_plan(model, each, budget, SPEEDS).memory for each in (one, many))
    assert more["Python and torch"] - few["Python and torch"] == 7 * 10 * (768 << 10)
    on_gpu = make_plan(Model(R1, 37, kernels=True), many, budget, SPEEDS).memory
    in_float32 = make_plan(Model(R1, 37, itemsize=4), many, budget, SPEEDS).memory
    assert on_gpu["Python and torch"] == in_float32["Python and torch"] < few["Python and torch"]
