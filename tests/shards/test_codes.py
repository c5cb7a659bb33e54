"""Code shards: what was written comes back, however it is asked for."""

import os
import pickle
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from r1sae_fast import SparseCodes
from r1sae_fast.errors import NonFiniteError, ShardError
from r1sae_fast.shards import CodeShards, CodeWriter

# Each shard is synced, and a disk takes its time over that; properties need no disk.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def random_codes(rows: int, d_sae: int, k: int, seed: int = 0) -> SparseCodes:
    """From 0 to k codes a row, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.zeros(rows, min(d_sae, 5000))
    for row in range(rows):
        count = int(torch.randint(0, k + 1, (1,), generator=generator))
        where = torch.randperm(dense.shape[1], generator=generator)[:count]
        dense[row, where] = torch.randint(1, 9, (len(where),), generator=generator) / 4
    codes = SparseCodes.from_dense(dense)
    # Spread the features over all of d_sae, in order, so that ties keep theirs.
    spread = codes.indices.long() * (d_sae - 1) // max(dense.shape[1] - 1, 1)
    return SparseCodes(codes.values, spread.int(), codes.row_offsets, d_sae)


def assert_equal(found: SparseCodes, wanted: SparseCodes) -> None:
    assert (found.d_sae, found.shape) == (wanted.d_sae, wanted.shape)
    assert torch.equal(found.row_offsets, wanted.row_offsets)
    assert torch.equal(found.indices, wanted.indices)
    assert found.indices.dtype == torch.int32
    assert torch.equal(found.values, wanted.values)
    assert found.values.dtype == wanted.values.dtype


def write(folder: Path, codes: SparseCodes, step: int, **options: object) -> None:
    with CodeWriter(folder, codes.d_sae, **options) as writer:  # type: ignore[arg-type]
        for start in range(0, len(codes), step):
            part = codes[start : start + step]
            writer.write(part, tokens=torch.arange(start, start + len(part)), segment=1)


@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d_sae", [1, 123, 65536, 65537, 2**31 - 1])
def test_round_trip(folder: Path, d_sae: int, values_dtype: str) -> None:
    codes = random_codes(57, d_sae, 9)
    write(folder, codes, 10, values_dtype=values_dtype, rows_per_shard=25, metadata={"k": 9})
    shards = CodeShards(folder)
    assert (len(shards), shards.d_sae, shards.nnz) == (57, d_sae, codes.nnz)
    assert shards.metadata == {"k": 9}
    assert shards.rows_per_file == [25, 25, 7]
    batch = shards[:]
    # The values above are exact in bfloat16.
    wanted = SparseCodes(codes.values.to(shards.dtype), codes.indices, codes.row_offsets, d_sae)
    assert_equal(batch.codes, wanted)
    assert torch.equal(batch.tokens, torch.arange(57, dtype=torch.int32))
    assert batch.segment.unique().tolist() == [1]
    assert batch.position.unique().tolist() == [-1]
    shards.verify()
    names = {"values", "indices", "row_offsets", "tokens", "sequence_id", "position", "segment"}
    tensors = load_file(shards.paths[0])
    assert set(tensors) == names
    assert tensors["indices"].dtype == (torch.uint16 if d_sae <= 65536 else torch.uint32)


@settings(max_examples=30)
@given(st.data())
def test_rows_are_chosen_as_from_codes_in_memory(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 30), label="rows")
    codes = random_codes(rows, 40, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 99)))
    bound = st.one_of(st.none(), st.integers(-rows, rows))
    key = data.draw(
        st.one_of(
            st.builds(slice, bound, bound, st.sampled_from([None, 1, 2])),
            st.lists(st.integers(-rows, rows - 1), max_size=9).map(
                lambda chosen: torch.tensor(chosen, dtype=torch.int64)
            ),
        ),
        label="key",
    )
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name) / "shards"
        write(folder, codes, 7, rows_per_shard=data.draw(st.integers(1, 12)))
        shards = CodeShards(folder)
        batch = shards[key]
        batch.codes.check()
        assert_equal(batch.codes, codes[key])
        assert torch.equal(batch.tokens, torch.arange(rows, dtype=torch.int32)[key])
        step = data.draw(st.integers(1, 40))
        batches = list(shards.iter_batches(step))
        assert [len(batch) for batch in batches] == [
            min(step, rows - start) for start in range(0, rows, step)
        ]
        assert_equal(SparseCodes.cat([batch.codes for batch in batches]), codes)


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_bytes_do_not_depend_on_how_rows_are_split(
    per_shard: int, step: int, other_step: int
) -> None:
    codes = random_codes(40, 300, 5)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        contents = []
        for number, rows in enumerate((step, other_step)):
            folder = Path(name) / str(number)
            write(folder, codes, rows, rows_per_shard=per_shard)
            contents.append([path.read_bytes() for path in CodeShards(folder).paths])
    assert contents[0] == contents[1]


@given(st.integers(0, 2**31))
def test_rounding_keeps_the_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = 1 + torch.rand(6, 50, generator=generator) / 64  # few bfloat16 numbers in between
    codes = SparseCodes.from_dense(dense)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        with CodeWriter(Path(name) / "shards", 50, values_dtype="bfloat16") as writer:
            writer.write(codes)
        back = CodeShards(Path(name) / "shards")[:].codes
    assert_equal(back.check(), SparseCodes.from_dense(dense.bfloat16()))


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("given", "high", "low"),
    [
        (torch.float16, 1.0009765625, 1.0),
        (torch.float32, 1.0000001, 1.0),
        (torch.float64, 1.00000000001, 1.0),
        (torch.float64, 1e-300, 1e-301),
    ],
)
def test_rounding_of_every_dtype_keeps_the_order(
    folder: Path, given: torch.dtype, high: float, low: float, values_dtype: torch.dtype
) -> None:
    """bfloat16 has as many bits as float16 but fewer of them for the digits."""
    values = torch.tensor([high, low, high, low], dtype=given)
    indices = torch.tensor([5, 2, 1, 7], dtype=torch.int32)
    codes = SparseCodes(values, indices, torch.tensor([0, 2, 4]), 8).check()
    with CodeWriter(folder, 8, values_dtype=values_dtype) as writer:
        writer.write(codes)
    back = CodeShards(folder)[:].codes.check()
    tied = bool(values[0].to(values_dtype) == values[1].to(values_dtype))
    assert back.indices.tolist() == ([2, 5, 1, 7] if tied else [5, 2, 1, 7])
    assert torch.equal(back.to_dense(), codes.to_dense().to(values_dtype))
    CodeShards(folder).verify()


def test_leading_shape_is_flattened(folder: Path) -> None:
    codes = random_codes(12, 20, 4)
    with CodeWriter(folder, 20) as writer:
        writer.write(codes.reshape(3, 4), position=range(12))
    assert_equal(CodeShards(folder)[:].codes, codes)


def test_empty_rows_and_no_rows(folder: Path) -> None:
    none = SparseCodes.from_dense(torch.zeros(5, 8))
    with CodeWriter(folder, 8, rows_per_shard=2) as writer:
        writer.write(none)
        writer.write(none[:0])
    shards = CodeShards(folder)
    assert (len(shards), shards.nnz) == (5, 0)
    assert_equal(shards[1:4].codes, none[1:4])
    assert_equal(shards[3:3].codes, none[:0])
    shards.verify()
    again = pickle.loads(pickle.dumps(shards))  # noqa: S301 - made right here
    assert len(again) == 5


def codes_of(values: list[float], indices: list[int], offsets: list[int]) -> SparseCodes:
    return SparseCodes(
        torch.tensor(values), torch.tensor(indices, dtype=torch.int32), torch.tensor(offsets), 8
    )


@pytest.mark.parametrize(
    ("codes", "error", "says"),
    [
        (torch.zeros(2, 8), TypeError, "Tensor; expected SparseCodes"),
        (SparseCodes.from_dense(torch.ones(1, 9)), ValueError, "d_sae = 9; this writer's is 8"),
        (codes_of([1.0], [8], [0, 1]), ValueError, "0 to 7"),
        (codes_of([1.0], [-1], [0, 1]), ValueError, "0 to 7"),
        (codes_of([1.0, 2.0], [0, 1], [0, 2, 1, 2]), ValueError, "falls after row 1"),
        (codes_of([1.0, float("nan")], [0, 1], [0, 1, 1, 2]), NonFiniteError, "row 2"),
        (codes_of([float("inf")], [0], [0, 1]), NonFiniteError, "row 0"),
        (codes_of([3.0, 1.0, 2.0], [0, 1, 2], [0, 1, 3]), ValueError, "out of order in row 1"),
        (codes_of([3.0, 1.0, 1.0], [0, 2, 1], [0, 0, 3]), ValueError, "out of order in row 1"),
        (codes_of([3.0, 2.0, 1.0], [5, 2, 5], [0, 0, 3]), ValueError, "row 1 .* feature 5 more"),
        (codes_of([2.0, 2.0], [5, 5], [0, 2]), ValueError, "row 0 .* feature 5 more"),
    ],
)
def test_bad_codes(folder: Path, codes: object, error: type[Exception], says: str) -> None:
    with CodeWriter(folder, 8) as writer:
        writer.write(codes_of([1.0], [3], [0, 1]))
        with pytest.raises(error, match=says):
            writer.write(codes)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"tokens has shape \(2,\); expected \(1,\)"):
            writer.write(codes_of([1.0], [3], [0, 1]), tokens=[1, 2])
        assert writer.pending == 1
    assert len(CodeShards(folder)) == 1


@pytest.mark.parametrize(
    ("d_sae", "options", "error"),
    [
        (0, {}, ValueError),
        (2**31, {}, ValueError),
        (8.0, {}, TypeError),
        (True, {}, TypeError),
        (8, {"values_dtype": "float16"}, ValueError),
        (8, {"rows_per_shard": 0}, ValueError),
    ],
)
def test_bad_arguments(
    folder: Path, d_sae: int, options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        CodeWriter(folder, d_sae, **options)  # type: ignore[arg-type]
    assert not folder.exists()


def test_wrong_kind_of_folder(folder: Path) -> None:
    from r1sae_fast.shards import ActivationShards, ActivationWriter

    with ActivationWriter(folder, 8):
        pass
    with pytest.raises(ShardError, match="holds activations, expected codes; open it with Act"):
        CodeShards(folder)
    with pytest.raises(ValueError, match="kind is 'activations', this writer's 'codes'"):
        CodeWriter(folder, 8, resume=True)
    assert len(ActivationShards(folder)) == 0
