"""Activation shards: what was written comes back, however it is asked for."""

import os
import pickle
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from r1sae_fast.shards import ActivationBatch, ActivationShards, ActivationWriter
from r1sae_fast.shards.activations import DTYPES, first_non_finite, quantize_fp8

# Each shard is synced, and a disk takes its time over that; properties need no disk.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
COLUMNS = ("tokens", "sequence_id", "position", "segment")
FP8 = "float8_e4m3"


def numbers(rows: int, d_in: int, seed: int = 0) -> torch.Tensor:
    """Residual-like: rows of very different sizes, one of zeros, a few large entries."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d_in, generator=generator)
    x *= torch.logspace(-3, 2, max(rows, 1))[:rows, None]
    x[rows // 2 : rows // 2 + 1] = 0
    return x


def columns_of(rows: int) -> dict[str, torch.Tensor]:
    row = torch.arange(rows)
    return {
        "tokens": (row * 7 % 129280).int(),
        "sequence_id": row // 10 + (1 << 40),
        "position": (row % 10).int(),
        "segment": (row % 3).to(torch.uint8),
    }


def expected(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The plain torch version of writing and reading."""
    if dtype == FP8:
        codes, scales = quantize_fp8(x)
        return (codes.float() * scales[:, None]).bfloat16()
    return x.to(DTYPES[dtype][0])


def write(folder: Path, x: torch.Tensor, dtype: str, step: int, **options: object) -> None:
    columns = columns_of(x.shape[0])
    with ActivationWriter(folder, x.shape[1], dtype, **options) as writer:  # type: ignore[arg-type]
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            writer.write(x[part], **{name: column[part] for name, column in columns.items()})


def assert_rows(batch: ActivationBatch, x: torch.Tensor, rows: torch.Tensor) -> None:
    columns = columns_of(x.shape[0])
    assert torch.equal(batch.activations, x[rows])
    for name in COLUMNS:
        column = getattr(batch, name)
        assert column.dtype == columns[name].dtype
        assert torch.equal(column, columns[name][rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_in", [1, 63, 64])
def test_round_trip(folder: Path, dtype: str, d_in: int) -> None:
    x = numbers(123, d_in)
    write(folder, x, dtype, step=10, rows_per_shard=50, metadata={"model": "tiny", "layer": 2})
    shards = ActivationShards(folder)
    assert (len(shards), shards.d_in, shards.rows_per_file) == (123, d_in, [50, 50, 23])
    assert shards.metadata == {"model": "tiny", "layer": 2}
    stored = expected(x, dtype)
    assert shards.dtype == stored.dtype
    everything = torch.arange(123)
    assert_rows(shards[:], stored, everything)
    assert_rows(shards[everything], stored, everything)
    shards.verify()


@settings(max_examples=30)
@given(st.data())
def test_rows_are_chosen_as_from_a_tensor(data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 40), label="rows")
    dtype = data.draw(st.sampled_from(sorted(DTYPES)), label="dtype")
    x = numbers(rows, 7)
    bound = st.one_of(st.none(), st.integers(-rows - 3, rows + 3))
    keys: list[st.SearchStrategy[object]] = [
        st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, -1, -3])),
        st.lists(st.booleans(), min_size=rows, max_size=rows).map(
            lambda mask: np.array(mask, dtype=bool)
        ),
    ]
    if rows:
        index = st.integers(-rows, rows - 1)
        keys += [
            index,
            index.map(np.int32),
            st.lists(index, max_size=9),
            st.lists(index, max_size=9).map(lambda chosen: torch.tensor(chosen, dtype=torch.int32)),
        ]
    key = data.draw(st.one_of(keys), label="key")
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name) / "shards"
        write(folder, x, dtype, step=9, rows_per_shard=data.draw(st.integers(1, 15)))
        batch = ActivationShards(folder)[key]
    where = key.tolist() if isinstance(key, torch.Tensor) else key
    chosen = torch.from_numpy(np.atleast_1d(np.arange(rows)[where]).astype(np.int64))
    assert len(batch) == chosen.shape[0]
    assert_rows(batch, expected(x, dtype), chosen)


@settings(max_examples=20)
@given(st.sampled_from(sorted(DTYPES)), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_bytes_do_not_depend_on_how_rows_are_split(
    dtype: str, per_shard: int, step: int, other_step: int
) -> None:
    x = numbers(60, 5)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        contents = []
        for number, rows in enumerate((step, other_step)):
            folder = Path(name) / str(number)
            write(folder, x, dtype, step=rows, rows_per_shard=per_shard)
            paths = sorted(path for path in folder.iterdir() if path.name != ".lock")
            contents.append([(path.name, path.read_bytes()) for path in paths])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_plain_safetensors(folder: Path, dtype: str) -> None:
    x = numbers(20, 6)
    write(folder, x, dtype, step=20)
    [path] = ActivationShards(folder).paths
    tensors = load_file(path)
    names = {"activations", *COLUMNS} | ({"scales"} if dtype == FP8 else set())
    assert set(tensors) == names
    assert tensors["activations"].dtype == DTYPES[dtype][0]
    assert torch.equal(tensors["tokens"], columns_of(20)["tokens"])
    if dtype == FP8:
        codes, scales = quantize_fp8(x)
        assert torch.equal(tensors["activations"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(tensors["scales"], scales)
    else:
        assert torch.equal(tensors["activations"], x.to(DTYPES[dtype][0]))


@pytest.mark.parametrize("requested", [torch.float32, "bfloat16", "float16"])
def test_fp8_is_decoded_as_torch_does(folder: Path, requested: torch.dtype | str) -> None:
    x = numbers(64, 256)
    write(folder, x, FP8, step=64, rows_per_shard=40)
    codes, scales = quantize_fp8(x)
    reference = codes.float() * scales[:, None]
    dtype = requested if isinstance(requested, torch.dtype) else getattr(torch, requested)
    batch = ActivationShards(folder, dtype=requested)[torch.arange(64).flip(0)]
    assert torch.equal(batch.activations, reference.to(dtype).flip(0))
    # e4m3 has 3 mantissa bits: half a step is 1/16 of the value, or 2^-10 of a row's scale.
    bound = torch.maximum(x.abs() / 16, scales[:, None] / 1024) * (1 + 1e-6)
    assert bool(((reference - x).abs() <= bound).all())


def test_every_fp8_code_is_decoded_as_torch_does(folder: Path) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()]
    assert finite.numel() == 254
    # A row that reaches 448 has scale 1, so that its codes are the numbers themselves.
    with ActivationWriter(folder, 254, FP8) as writer:
        writer.write(finite[None])
    assert torch.equal(ActivationShards(folder, dtype="float32")[0].activations[0], finite)


def test_fp8_of_extreme_rows(folder: Path) -> None:
    # Near float32's largest; below where 1/448 of it is a normal number; the smallest; zeros.
    x = torch.tensor([[3e38, -1e38], [1e-38, -1e-38], [1e-45, 0.0], [0.0, -0.0]])
    with ActivationWriter(folder, 2, FP8) as writer:
        writer.write(x)
    back = ActivationShards(folder, dtype="float32")[:].activations
    assert torch.allclose(back, x, rtol=1 / 16, atol=2.0**-126)
    assert float(back[0, 0]) == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_dtype_on_reading(folder: Path, dtype: str) -> None:
    x = numbers(20, 6)
    write(folder, x, "float32", step=20)
    shards = ActivationShards(folder, dtype=dtype)
    assert torch.equal(shards[3:9].activations, x[3:9].to(DTYPES[dtype][0]))
    assert torch.equal(shards[[9, 3]].activations, x[[9, 3]].to(DTYPES[dtype][0]))


def test_slices_are_mapped_and_are_the_callers_own(folder: Path) -> None:
    x = numbers(600, 1024)
    write(folder, x, "float32", step=600, rows_per_shard=400)
    before = [path.read_bytes() for path in ActivationShards(folder).paths]
    shards = ActivationShards(folder)
    first, second = shards[10:390].activations, shards[10:390].activations
    assert torch.equal(first, x[10:390])
    assert first.data_ptr() != second.data_ptr()
    first.zero_()  # faults if the mapping were read-only
    first += 7
    assert bool((first == 7).all())
    assert torch.equal(second, x[10:390])
    assert torch.equal(shards[10:390].activations, x[10:390])
    assert torch.equal(shards[torch.arange(10, 390)].activations, x[10:390])
    assert [path.read_bytes() for path in shards.paths] == before
    # The mapping lives as long as its tensor, not as long as the shards.
    view = second[5]
    del shards, second, first
    assert torch.equal(view, x[15])
    assert torch.equal(ActivationShards(folder)[390:410].activations, x[390:410])


def test_a_mapped_slice_copies_nothing(folder: Path) -> None:
    """The pages of the slice are the file's: none is private until it is written to."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs Linux's /proc/self/smaps to see which pages are private")
    rows, d_in = 512, 4096  # 8 MiB
    write(folder, numbers(rows, d_in), "float32", step=rows)
    shards = ActivationShards(folder)
    batch = shards[:]
    total = float(batch.activations.sum())
    assert np.isfinite(total)
    assert private_kib(batch.activations.data_ptr()) == 0
    batch.activations[0, 0] = 1
    assert 0 < private_kib(batch.activations.data_ptr()) <= 64


def private_kib(address: int) -> int:
    """KiB of modified private pages in the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            low, high = (int(end, 16) for end in fields[0].split("-"))
            inside = low <= address < high
        elif inside and fields[0] == "Anonymous:":
            return int(fields[1])
    raise AssertionError("address not mapped")


def test_input_forms(folder: Path) -> None:
    x = numbers(12, 4)
    fortran = np.asfortranarray(x.numpy())
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    forms = [x, x.double(), x.clone().requires_grad_(), x.numpy(), fortran, read_only]
    forms += [x.numpy()[::-1][::-1], x.numpy().astype(">f4"), x.t().contiguous().t()]
    with ActivationWriter(folder, 4, "float32") as writer:
        for form in forms:
            writer.write(form)
        writer.write(x[:0])
        assert (writer.pending, writer.rows) == (12 * len(forms), 0)
    assert not read_only.flags.writeable
    assert torch.equal(ActivationShards(folder)[:].activations, x.repeat(len(forms), 1))


def test_columns_default_to_unknown_and_may_be_one_number(folder: Path) -> None:
    with ActivationWriter(folder, 2) as writer:
        writer.write(torch.zeros(3, 2))
        writer.write(
            torch.zeros(2, 2), tokens=[5, 6], sequence_id=2**40, position=(0, 1), segment=2
        )
        writer.write(torch.zeros(1, 2), tokens=np.array([9], dtype=np.uint16))
    batch = ActivationShards(folder)[:]
    assert batch.tokens.tolist() == [-1, -1, -1, 5, 6, 9]
    assert batch.sequence_id.tolist() == [-1, -1, -1, 2**40, 2**40, -1]
    assert batch.position.tolist() == [-1, -1, -1, 0, 1, -1]
    assert batch.segment.tolist() == [255, 255, 255, 2, 2, 255]


def test_what_was_written_may_change_afterwards(folder: Path) -> None:
    x = numbers(8, 4)
    given_rows, tokens = x.clone(), torch.arange(8, dtype=torch.int32)
    with ActivationWriter(folder, 4, "float32") as writer:
        writer.write(given_rows, tokens=tokens)
        given_rows.zero_()
        tokens.zero_()
    batch = ActivationShards(folder)[:]
    assert torch.equal(batch.activations, x)
    assert batch.tokens.tolist() == list(range(8))


def test_shards_can_be_pickled_and_are_independent_of_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = numbers(300, 512)
    write(folder, x, "float32", step=300)
    monkeypatch.chdir(folder.parent)
    shards = ActivationShards(folder.name, dtype="bfloat16")
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(shards))  # noqa: S301 - made one line above
    assert again.dtype == torch.bfloat16
    assert torch.equal(again[5:7].activations, shards[5:7].activations)
    assert torch.equal(ActivationShards(folder)[:].activations, x)


@pytest.mark.parametrize(
    ("key", "error", "says"),
    [
        (20, IndexError, "row 20 is out of range for 20 rows"),
        (-21, IndexError, "row -21"),
        ([0, 20], IndexError, "row 20"),
        (torch.tensor([-21]), IndexError, "row -21"),
        (torch.ones(3, dtype=torch.bool), IndexError, "3 elements for 20 rows"),
        (torch.tensor([0.5]), TypeError, "float"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "one dimension"),
        ("x", TypeError, "str"),
        (1.0, TypeError, "float"),
    ],
)
def test_bad_rows(folder: Path, key: object, error: type[Exception], says: str) -> None:
    write(folder, numbers(20, 3), "float32", step=20)
    with pytest.raises(error, match=says):
        ActivationShards(folder)[key]


def test_an_empty_folder_of_shards(folder: Path) -> None:
    with ActivationWriter(folder, 3):
        pass
    shards = ActivationShards(folder)
    assert (len(shards), shards.paths) == (0, [])
    assert shards[:].activations.shape == (0, 3)
    assert list(shards.loader(4)) == []
    shards.verify()


@given(st.lists(st.sampled_from([0.0, 1.0, 3e38, -3e38, 1e308]), min_size=3, max_size=12))
def test_large_numbers_are_not_taken_for_infinite(values: list[float]) -> None:
    rows = torch.tensor(values[: len(values) // 3 * 3], dtype=torch.float64).reshape(-1, 3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        plain = (~rows.to(dtype).isfinite()).any(dim=1).nonzero().flatten().tolist()
        assert first_non_finite(rows.to(dtype)) == (plain[0] if plain else None)
