"""collect_examples against sorting everything, however the rows are cut, ordered and threaded."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.examples import Examples, collect_examples, histogram_edges
from r1sae_fast.examples.ranges import RowRanges

D_SAE = 11
# Few strengths, so that ties abound; the ends of the histogram; all exact in bfloat16.
STRENGTHS = [0.0, 2.0**-20, 2.0**-12, 0.25, 0.5, 0.75, 1.0, 3.0, 2.0**12, 2.0**20]


MASK = 2**64 - 1


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def rank(row: int, seed: int) -> int:
    """``rust/core/src/examples/samples.rs`` once more, in plain Python."""
    golden = 0x9E3779B97F4A7C15
    return mix(mix(row + mix(seed + golden & MASK) & MASK) ^ golden)


def reference_samples(
    dense: torch.Tensor, bins: np.ndarray, samples: int, seed: int
) -> dict[str, Any]:
    """Of each bin of each feature, the rows that are ranked first."""
    offsets, rows = [0], []
    features = []
    for feature in range(dense.shape[1]):
        active = dense[:, feature].numpy() > 0
        for place in range(96):
            inside = np.flatnonzero(active & (bins[:, feature] == place)).tolist()
            rows += sorted(inside, key=lambda row: rank(row, seed))[:samples]
        features += [feature] * (len(rows) - offsets[-1])
        offsets.append(len(rows))
    return {
        "sample_offsets": torch.tensor(offsets),
        "sample_rows": torch.tensor(rows, dtype=torch.int64),
        "sample_strengths": dense[rows, features],
    }


def reference(dense: torch.Tensor, n: int, samples: int = 4, seed: int = 0) -> dict[str, Any]:
    """Everything by sorting all rows of each feature."""
    rows, d_sae = dense.shape
    strengths = torch.zeros(d_sae, n)
    ids = torch.full((d_sae, n), -1)
    for feature, column in enumerate(dense.T.tolist()):
        active = sorted((-strength, row) for row, strength in enumerate(column) if strength > 0)
        for rank, (negative, row) in enumerate(active[:n]):
            strengths[feature, rank], ids[feature, rank] = -negative, row
    edges = histogram_edges().numpy()
    bins = np.clip(np.searchsorted(edges, dense.numpy(), side="right") - 1, 0, len(edges) - 2)
    histogram = np.zeros((d_sae, len(edges) - 1), dtype=np.int64)
    at_row, at_feature = np.nonzero(dense.numpy() > 0)
    np.add.at(histogram, (at_feature, bins[at_row, at_feature]), 1)
    return {
        "strengths": strengths,
        "rows": ids,
        "histogram": torch.from_numpy(histogram),
        "counts": (dense > 0).sum(dim=0),
        "maxima": dense.max(dim=0).values if rows else torch.zeros(d_sae),
        "sums": torch.tensor(
            [math.fsum(column) for column in dense.T.double().tolist()], dtype=torch.float64
        ),
        **reference_samples(dense, bins, samples, seed),
    }


def assert_matches(
    examples: Examples, dense: torch.Tensor, n: int, samples: int = 4, seed: int = 0
) -> None:
    for name, expected in reference(dense, n, samples, seed).items():
        found = getattr(examples, name)
        assert found.shape == expected.shape, name
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=0, msg=name)
    assert examples.scanned == dense.shape[0]


@st.composite
def dense_codes(draw: st.DrawFn) -> torch.Tensor:
    rows = draw(st.integers(0, 70))
    picks = draw(st.lists(st.sampled_from(STRENGTHS), min_size=4, max_size=30))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    dense = generator.choice(picks, size=(rows, D_SAE)) * (generator.random((rows, D_SAE)) < 0.4)
    return torch.from_numpy(dense.astype(np.float32))


@given(
    dense=dense_codes(),
    n=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 70), max_size=5),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    threads=st.integers(1, 3),
)
def test_equals_sorting_everything_however_it_is_cut(
    dense: torch.Tensor, n: int, cuts: list[int], order: Any, dtype: torch.dtype, threads: int
) -> None:
    bounds = sorted({0, dense.shape[0], *(min(cut, dense.shape[0]) for cut in cuts)})
    batches = [
        (start, SparseCodes.from_dense(dense[start:stop].to(dtype)))
        for start, stop in pairwise(bounds)
    ] or [(0, SparseCodes.from_dense(dense))]
    in_order = collect_examples((codes for _, codes in batches), n, threads=threads)
    assert_matches(in_order, dense, n)

    order.shuffle(batches)
    shuffled = collect_examples(batches, n, threads=threads)
    assert shuffled.equal(in_order)

    parts = [collect_examples([batch], n) for batch in batches]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.equal(in_order)


@given(
    seed=st.integers(0, 2**32 - 1),
    simd=st.sampled_from(list(ops.simd_info().available)),
    threads=st.sampled_from([1, 2, 4]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    samples=st.integers(0, 6),
    sample_seed=st.integers(0, MASK),
    cut=st.integers(0, 400),
)
@settings(max_examples=25)
def test_ordinary_strengths_in_many_rows(
    seed: int, simd: str, threads: int, spread: float, samples: int, sample_seed: int, cut: int
) -> None:
    """As an SAE gives: no zeros, so that the quick way is taken; counts that fill small cells."""
    rng = np.random.default_rng(seed)
    dense = np.exp(rng.normal(0, spread, (400, 9))) * (rng.random((400, 9)) < 0.8)
    dense = torch.from_numpy(dense.astype(np.float32))
    before = ops.simd_info().active
    ops.set_simd(simd)
    try:
        parts = [(0, dense[:cut]), (cut, dense[cut:])]
        found = collect_examples(
            [(first, SparseCodes.from_dense(part)) for first, part in parts],
            3,
            samples=samples,
            seed=sample_seed,
            threads=threads,
        )
    finally:
        ops.set_simd(before)
    # Sums of doubles are exact here: the strengths span few octaves, or are few.
    assert_matches(found, dense, 3, samples, sample_seed)


@given(dense=dense_codes(), n=st.integers(1, 5))
def test_a_saved_file_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, dense: torch.Tensor, n: int
) -> None:
    examples = collect_examples(SparseCodes.from_dense(dense), n)
    path = tmp_path_factory.mktemp("saved") / "examples.safetensors"
    examples.save(path)
    assert Examples.load(path).equal(examples)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_leading_dimensions_are_flattened_and_rows_go_on() -> None:
    dense = torch.rand(2, 3, D_SAE)
    batch = SparseCodes.from_dense(dense)
    examples = collect_examples([batch, batch], n=12, first_row=100)
    assert sorted(examples.rows[0].tolist()) == list(range(100, 112))
    assert_matches(collect_examples(batch, n=4), dense.reshape(6, D_SAE), n=4)


def test_wide_codes() -> None:
    # Feature ids beyond 16 bits, n = 20, on several threads: more codes than one thread is given.
    generator = torch.Generator().manual_seed(0)
    rows, d_sae, k = 40_000, 70_000, 64
    indices = torch.stack(
        [(torch.randint(0, d_sae // k, (rows,), generator=generator) * k + i) for i in range(k)],
        dim=1,
    ).to(torch.int32)
    values = torch.rand(rows, k, generator=generator).sort(dim=1, descending=True).values + 0.1
    offsets = torch.arange(0, rows * k + 1, k)
    codes = SparseCodes(values.reshape(-1), indices.reshape(-1), offsets, d_sae)
    one = collect_examples(codes, n=20, threads=1)
    assert one.equal(collect_examples(codes, n=20, threads=2))
    for feature in (0, d_sae // k * k - 1, 12_345):
        at = (indices == feature).nonzero()
        found = values[at[:, 0], at[:, 1]]
        order = found.argsort(descending=True, stable=True)[:20]
        assert len(at) > 20
        assert one.strengths[feature].tolist() == found[order].tolist()
        assert one.rows[feature].tolist() == at[order, 0].tolist()
        assert int(one.counts[feature]) == len(at)


def test_sums_do_not_depend_on_order_where_floats_would() -> None:
    big, small = 2.0**30, 2.0**-25
    column = torch.tensor([[big], [small], [small], [small], [small]])
    there = collect_examples(SparseCodes.from_dense(column), n=1)
    back = collect_examples(SparseCodes.from_dense(column.flip(0)), n=1)
    assert there.sums.tolist() == back.sums.tolist() == [big + 4 * small]


def codes_with(value: float, row: int = 2) -> SparseCodes:
    dense = torch.zeros(5, D_SAE)
    dense[:, 3] = 1.0
    dense[row, 4] = value
    return SparseCodes.from_dense(dense)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_strengths_are_named_by_row(value: float) -> None:
    with pytest.raises(NonFiniteError, match="row 52"):
        collect_examples(codes_with(value), first_row=50)


def test_negative_strengths_are_named_by_row() -> None:
    with pytest.raises(ValueError, match=r"strength -1 in row 2.*relu"):
        collect_examples(codes_with(-1.0))


@pytest.mark.parametrize("index", [-1, D_SAE])
def test_feature_ids_out_of_range(index: int) -> None:
    codes = SparseCodes(
        torch.ones(2),
        torch.tensor([0, index], dtype=torch.int32),
        torch.tensor([0, 1, 2]),
        D_SAE,
    )
    with pytest.raises(ValueError, match=r"feature id .* in row 1.*0\.\.11"):
        collect_examples(codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_twice_in_a_row_is_named(dtype: torch.dtype) -> None:
    indices = torch.tensor([4, 4, 7, 4, 7], dtype=torch.int32)
    codes = SparseCodes(torch.ones(5, dtype=dtype), indices, torch.tensor([0, 1, 2, 5]), D_SAE)
    assert collect_examples(codes[:2]).counts[4] == 2  # in two rows it may
    with pytest.raises(ValueError, match="feature 7 is active twice in row 12"):
        collect_examples(codes, first_row=10)


@given(
    ranges=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=12),
)
def test_row_ranges_are_those_of_a_set(ranges: list[tuple[int, int]]) -> None:
    added, expected = RowRanges(), set[int]()
    for start, length in ranges:
        rows = set(range(start, start + length))
        if rows & expected:
            with pytest.raises(ValueError, match=rf"hold row {min(rows & expected)}, which"):
                added.add(start, start + length)
        else:
            added.add(start, start + length)
            expected |= rows
    pieces = list(zip(added.starts, added.stops, strict=True))
    assert {row for start, stop in pieces for row in range(start, stop)} == expected
    assert all(before[1] < after[0] for before, after in pairwise(pieces))


def test_batches_of_the_same_rows_are_refused() -> None:
    weak, strong = codes_with(1.0), codes_with(10.0)
    with pytest.raises(ValueError, match=r"rows 0\.\.5 hold row 0.*counted twice"):
        collect_examples([(0, weak), (0, weak)], n=1)
    # Also when nothing of the rows is an example any more, or just some rows are the same.
    with pytest.raises(ValueError, match=r"rows 4\.\.9 hold row 5"):
        collect_examples([(0, weak[:4]), (5, strong), (4, weak)], n=1)


def test_offsets_that_fall() -> None:
    codes = SparseCodes(
        torch.ones(4),
        torch.arange(4, dtype=torch.int32),
        torch.tensor([0, 3, 1, 4]),
        D_SAE,
    )
    with pytest.raises(ValueError, match="row 1 begins at 3 and ends at 1"):
        collect_examples(codes)


@pytest.mark.parametrize("n", [0, 65_536])
def test_n_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.=65535, found"):
        collect_examples(codes_with(1.0), n)


def test_no_codes_other_widths_and_other_things() -> None:
    with pytest.raises(ValueError, match="no codes"):
        collect_examples([])
    narrow = SparseCodes.from_dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match="d_sae = 3 follow codes of d_sae = 11"):
        collect_examples([codes_with(1.0), narrow])
    with pytest.raises(TypeError, match="hold a Tensor; expected SparseCodes"):
        collect_examples([torch.ones(3)])  # type: ignore[list-item]  # what is tested
    with pytest.raises(ValueError, match="needs code shards"):
        collect_examples(codes_with(1.0), checkpoint="x.safetensors")
    with pytest.raises(ValueError, match="threads is 0"):
        collect_examples(codes_with(1.0), threads=0)
    with pytest.raises(ValueError, match="first_row is -1"):
        collect_examples(codes_with(1.0), first_row=-1)


def test_merge_refuses_other_settings() -> None:
    examples = collect_examples(codes_with(1.0), n=3)
    for words, options in (
        ("n = 3, .* merged with .* n = 4,", {"n": 4}),
        ("samples = 4 .* samples = 5 ", {"n": 3, "samples": 5}),
        ("seed = 0 .* seed = 5:", {"n": 3, "seed": 5}),
    ):
        with pytest.raises(ValueError, match=words):
            examples.merge(collect_examples(codes_with(1.0), first_row=9, **options))


def test_merge_refuses_the_same_rows_twice(tmp_path: Path) -> None:
    """Also when nothing of the rows is an example any more, and after saving and merging."""
    weak, strong = codes_with(1.0), codes_with(10.0)
    examples = collect_examples([(5, weak), (10, strong)], n=1, samples=0)
    assert examples.row_ranges.tolist() == [[5, 15]]
    merged = examples.merge(collect_examples(weak, n=1, samples=0, first_row=20))
    assert merged.row_ranges.tolist() == [[5, 15], [20, 25]]
    merged.save(tmp_path / "merged")
    loaded = Examples.load(tmp_path / "merged")
    for first in (3, 5, 14, 18, 24):
        with pytest.raises(ValueError, match=r"hold row \d+, which other codes held.*twice"):
            loaded.merge(collect_examples(weak, n=1, samples=0, first_row=first))
    whole = loaded.merge(collect_examples(weak, n=1, samples=0, first_row=15))
    assert whole.row_ranges.tolist() == [[5, 25]]
    assert whole.scanned == 20


@given(
    strengths=st.lists(st.floats(0.015625, 100, width=32), max_size=60),
    samples=st.integers(1, 8),
    count=st.integers(1, 8),
    per_interval=st.integers(0, 10),
    by=st.sampled_from(["strength", "count"]),
)
def test_intervals(
    strengths: list[float], samples: int, count: int, per_interval: int, by: str
) -> None:
    column = torch.tensor(strengths, dtype=torch.float32)[:, None]
    examples = collect_examples(SparseCodes.from_dense(column), n=1, samples=samples, seed=9)
    found = examples.intervals(0, count, per_interval, by) if len(strengths) else []
    assert len(found) <= count
    assert sum(interval.count for interval in found) == len(strengths)
    for at, interval in enumerate(found):
        inside = [
            row
            for row, value in enumerate(column[:, 0].tolist())
            if interval.low <= value < interval.high
        ]
        assert interval.count == len(inside)
        assert interval.low == (0.0 if at == 0 else found[at - 1].high)
        expected = sorted(inside, key=lambda row: rank(row, 9))
        # The first ranks of all rows of the interval, and at least so many as of one bin.
        assert interval.rows == expected[: len(interval.rows)]
        assert min(per_interval, samples, len(inside)) <= len(interval.rows) <= per_interval
        assert interval.strengths == column[interval.rows, 0].tolist()
    if len(strengths):
        assert found[-1].high == math.inf


def test_intervals_cut_where_asked() -> None:
    column = torch.arange(1, 1001, dtype=torch.float32)[:, None] / 100
    examples = collect_examples(SparseCodes.from_dense(column), n=1)
    lows = [interval.low for interval in examples.intervals(0, 5, 3)]
    assert lows == pytest.approx([0, 2, 4, 6, 8], rel=0.1)
    counts = [interval.count for interval in examples.intervals(0, 4, 3, "count")]
    assert counts == pytest.approx([250] * 4, abs=100)
    dead = collect_examples(SparseCodes.from_dense(torch.zeros(3, 1)), n=1)
    assert dead.intervals(0) == []
    for bad in ((0, 5, "strength"), (5, -1, "strength"), (5, 5, "rank")):
        with pytest.raises(ValueError, match="expected"):
            examples.intervals(0, *bad)
    with pytest.raises(IndexError, match="feature 1 is out of range for 1"):
        examples.intervals(1)


def test_samples_out_of_range() -> None:
    with pytest.raises(ValueError, match="samples is 256; expected 0 to 255"):
        collect_examples(codes_with(1.0), samples=256)
    with pytest.raises(ValueError, match="seed is -1"):
        collect_examples(codes_with(1.0), seed=-1)


def damaged(examples: Examples, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in examples._tensors().items()} | changes


def test_files_that_no_collection_made_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "examples.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Examples.load(path)

    examples = collect_examples(codes_with(2.0), n=3)
    examples.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], b"\xff" * 100, whole[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Examples.load(path)

    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no examples file"):
        Examples.load(path)

    numbers = {"scanned": "5", "samples": "4", "seed": "0"}
    header = {"format": "r1sae-examples", "version": "2", **numbers}
    unsorted = examples.strengths.clone()
    unsorted[3] = torch.tensor([1.0, 2.0, 1.0])
    for changes, message in [
        ({"strengths": unsorted}, "slot 1 is out of order"),
        ({"rows": examples.rows.masked_fill(examples.rows == 0, -7)}, "of row -7"),
        ({"histogram": examples.histogram * 2}, "active 2 times but 1 examples"),
        ({"histogram": examples.histogram.roll(1, dims=1)}, "lacks some of its examples"),
        ({"sample_rows": examples.sample_rows.flip(0)}, "sample of row . is out of order"),
        ({"sample_rows": examples.sample_rows - 9}, "a sample has strength .* of row -"),
        ({"sample_rows": examples.sample_rows[1:].clone()}, "need"),
        ({"sample_offsets": examples.sample_offsets + 1}, "its samples span|has . samples"),
        ({"sample_offsets": examples.sample_offsets * 0}, "has 0 samples of at most 4"),
        ({"row_ranges": torch.tensor([[0, 4]])}, "row_ranges are not of 5 rows"),
        ({"row_ranges": torch.tensor([[3, 5], [0, 3]])}, "row_ranges are not in order"),
        ({"histogram": examples.histogram[:, :-1].contiguous()}, "need"),
        ({"rows": examples.rows.to(torch.int32)}, "rows is torch.int32"),
        ({"strengths": examples.strengths[0].clone()}, "expected torch.float32 with 2 dim"),
    ]:
        save_file(damaged(examples, **changes), path, metadata=header)
        with pytest.raises(ValueError, match=message):
            Examples.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "examples.safetensors"
    examples = collect_examples(codes_with(1.0), n=3)
    examples.save(path)
    (tmp_path / "examples.safetensors.tmp").mkdir()  # the temporary name can't be written
    with pytest.raises(OSError, match=r"examples\.safetensors\.tmp"):
        collect_examples(codes_with(9.0), n=3).save(path)
    assert Examples.load(path).equal(examples)
