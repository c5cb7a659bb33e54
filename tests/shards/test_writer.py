"""What writers promise: all or nothing, one at a time, and a way to go on."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1sae_fast import SparseCodes
from r1sae_fast.errors import NonFiniteError, R1SaeError, ShardError
from r1sae_fast.shards import (
    ActivationShards,
    ActivationWriter,
    CodeShards,
    CodeWriter,
    ManifestWarning,
)

NAN, INF = float("nan"), float("inf")


def rows(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop, dtype=torch.float32)[:, None].expand(-1, 4)


def with_value(value: float, row: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.zeros(6, 4, dtype=dtype)
    x[row, 2] = value
    return x


def tokens(folder: Path) -> list[int]:
    return [int(token) for token in ActivationShards(folder)[:].tokens]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "options", "error", "says"),
    [
        (torch.zeros(6, 5), {}, ValueError, r"shape \(6, 5\); expected \[n, d_in\] with d_in = 4"),
        (torch.zeros(4), {}, ValueError, r"shape \(4,\)"),
        (torch.zeros(2, 3, 4), {}, ValueError, r"reshape\(-1, d_in\)"),
        (torch.zeros(6, 4, dtype=torch.int64), {}, TypeError, "int64; expected floats"),
        (torch.zeros(6, 4, dtype=torch.bool), {}, TypeError, "bool; expected floats"),
        (torch.zeros(6, 4, dtype=torch.complex64), {}, TypeError, "complex64; expected floats"),
        (torch.zeros(6, 4, device="meta"), {}, ValueError, "meta device"),
        (np.zeros((6, 4), dtype=np.int32), {}, TypeError, "int32; expected floats"),
        (np.zeros((6, 4), dtype=object), {}, TypeError, "object; expected floats"),
        ([[0.0] * 4], {}, TypeError, "list; expected a torch tensor or numpy array"),
        (with_value(NAN), {}, NonFiniteError, "row 3 of 6"),
        (with_value(INF, row=0), {}, NonFiniteError, "row 0 of 6"),
        (with_value(-INF, row=5).bfloat16(), {}, NonFiniteError, "row 5 of 6"),
        (with_value(1e39, dtype=torch.float64), {}, ValueError, r"1e\+39 in row 3, more than"),
        (torch.zeros(6, 4), {"tokens": range(5)}, ValueError, r"tokens has shape \(5,\); exp"),
        (torch.zeros(6, 4), {"tokens": [0.5] * 6}, TypeError, "tokens has dtype float64"),
        (torch.zeros(6, 4), {"position": torch.zeros(6)}, TypeError, "position has dtype"),
        (torch.zeros(6, 4), {"segment": torch.ones(6).bool()}, TypeError, "segment has dtype"),
        (torch.zeros(6, 4), {"segment": 256}, ValueError, "segment goes from 256 to 256"),
        (torch.zeros(6, 4), {"tokens": 2**31}, ValueError, "tokens goes from 2147483648"),
        (torch.zeros(6, 4), {"position": [-(2**40)] * 6}, ValueError, "position goes from"),
        (torch.zeros(6, 4), {"sequence_id": 2**63}, ValueError, "more than a 64-bit integer"),
        (torch.zeros(6, 4), {"sequence_id": "abc"}, TypeError, "sequence_id"),
        (torch.zeros(6, 4), {"sequence_id": [[1], [2, 3]]}, TypeError, "sequence_id"),
        (torch.zeros(6, 4), {"sequence_id": torch.zeros(6, 1).long()}, ValueError, r"\(6, 1\)"),
    ],
)
def test_bad_rows(
    folder: Path, x: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    """Refused whole, before a shard that they would have filled is written."""
    with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
        writer.write(rows(0, 1), tokens=[0])
        with pytest.raises(error, match=says):
            writer.write(x, **options)
        assert (writer.pending, writer.rows) == (1, 0)
        writer.write(rows(1, 2), tokens=[1])
    assert tokens(folder) == [0, 1]


def test_numbers_beyond_float16(folder: Path) -> None:
    with ActivationWriter(folder, 4, "float16", rows_per_shard=2) as writer:
        with pytest.raises(ValueError, match=r"70000 in row 3, .* \(65504\)"):
            writer.write(with_value(70000.0))
        writer.write(with_value(65504.0))
    assert float(ActivationShards(folder)[3].activations.max()) == 65504


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
@pytest.mark.parametrize("value", [1e39, -1e39, 1e300])
def test_numbers_beyond_float32(folder: Path, dtype: str, value: float) -> None:
    with ActivationWriter(folder, 4, dtype, rows_per_shard=2) as writer:
        with pytest.raises(ValueError, match=r"in row 3, more than torch\."):
            writer.write(with_value(value, dtype=torch.float64))
        assert writer.pending == 0
        writer.write(with_value(3e38, dtype=torch.float64))
    found = ActivationShards(folder)[:].activations
    assert bool(found.isfinite().all())
    assert float(found.max()) == pytest.approx(3e38, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_columns_of_unsigned_tensors(folder: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([0, 7, 255]).to(dtype)
    with ActivationWriter(folder, 4) as writer:
        writer.write(rows(0, 3), values, values, values, values)
        writer.write(rows(3, 5), values[2], position=values[:2])
    batch = ActivationShards(folder)[:]
    assert batch.tokens.tolist() == [0, 7, 255, 255, 255]
    assert batch.sequence_id.tolist() == [0, 7, 255, -1, -1]
    assert batch.position.tolist() == [0, 7, 255, 0, 7]
    assert batch.segment.tolist() == [0, 7, 255, 255, 255]


@pytest.mark.parametrize(
    ("name", "value", "dtype", "says"),
    [
        ("segment", 256, torch.uint16, "segment goes from 256 to 256; expected 0 to 255"),
        ("tokens", 2**31, torch.uint32, "tokens goes from 2147483648"),
        ("position", 2**40, torch.uint64, "position goes from 1099511627776"),
        ("sequence_id", -1, torch.uint64, "holds 18446744073709551615, more than a 64-bit"),
    ],
)
def test_unsigned_tensors_out_of_range(
    folder: Path, name: str, value: int, dtype: torch.dtype, says: str
) -> None:
    column = torch.tensor([value]).to(dtype)
    with ActivationWriter(folder, 4) as writer:
        with pytest.raises(ValueError, match=says):
            writer.write(rows(0, 1), **{name: column})
        assert writer.pending == 0


def test_check_can_be_turned_off(folder: Path) -> None:
    with ActivationWriter(folder, 4, "bfloat16", check_finite=False) as writer:
        writer.write(with_value(NAN))
    assert int(ActivationShards(folder)[:].activations.isnan().nonzero()[0, 0]) == 3
    ActivationShards(folder).verify()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((0,), {}, ValueError, "d_in is 0"),
        ((4.0,), {}, TypeError, "d_in is 4.0"),
        ((True,), {}, TypeError, "d_in is True"),
        ((4, "int8"), {}, ValueError, "dtype is 'int8'; expected one of bfloat16"),
        ((4, torch.int32), {}, ValueError, "dtype is torch.int32"),
        ((4,), {"rows_per_shard": 0}, ValueError, "rows_per_shard is 0"),
        ((4,), {"rows_per_shard": 1.5}, TypeError, "rows_per_shard is 1.5"),
        ((4,), {"metadata": {"a": {1, 2}}}, TypeError, "metadata can't be written as JSON"),
        ((4,), {"metadata": {"a": NAN}}, ValueError, "metadata can't be written as JSON"),
    ],
)
def test_bad_arguments(
    folder: Path,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        ActivationWriter(folder, *arguments, **options)
    assert not folder.exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, "float8_e4m3fn", "float8_e4m3"])
def test_dtypes_by_any_name(folder: Path, dtype: Any) -> None:
    with ActivationWriter(folder, 4, dtype) as writer:
        writer.write(rows(0, 2))
    assert ActivationShards(folder).stored_dtype == "float8_e4m3"


# -- the folder ------------------------------------------------------------------------------


def test_a_folder_of_shards_is_not_overwritten(folder: Path) -> None:
    with ActivationWriter(folder, 4) as writer:
        writer.write(rows(0, 3), tokens=range(3))
    with pytest.raises(FileExistsError, match=r"holds shards already; .* resume=True"):
        ActivationWriter(folder, 4)
    assert tokens(folder) == [0, 1, 2]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(FileExistsError, match=r"it holds 'thesis\.tex'"):
        ActivationWriter(tmp_path, 4, resume=resume)
    assert listing(tmp_path) == ["thesis.tex"]
    with pytest.raises(NotADirectoryError, match="not a folder"):
        ActivationWriter(tmp_path / "thesis.tex", 4)


def test_parent_folders_are_made(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path / "a" / "b", 4) as writer:
        writer.write(rows(0, 1))
    assert len(ActivationShards(tmp_path / "a" / "b")) == 1


def test_two_writers(folder: Path) -> None:
    with ActivationWriter(folder, 4) as writer:
        writer.write(rows(0, 2), tokens=range(2))
        for resume in (False, True):
            with pytest.raises(
                ShardError, match=f"{re.escape(str(folder))}.*another writer is at work"
            ):
                ActivationWriter(folder, 4, resume=resume)
        with pytest.raises(ShardError, match="another writer is at work"):
            CodeWriter(folder, 4, resume=True)
    assert tokens(folder) == [0, 1]
    with ActivationWriter(folder, 4, resume=True) as writer:
        writer.write(rows(2, 3), tokens=[2])
    assert tokens(folder) == [0, 1, 2]


HOLDS_THE_LOCK = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("locked")
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_a_writer_in_another_process(folder: Path) -> None:
    """The lock is flock's, on ``.lock``, so that other programs can keep to it."""
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(folder / ".lock")]
    with ActivationWriter(folder, 4):
        done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert done.stderr.strip() == "locked"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"holding\n"
        with pytest.raises(ShardError, match="another writer is at work"):
            ActivationWriter(folder, 4, resume=True)
        other.kill()
    with ActivationWriter(folder, 4, resume=True):
        pass


def test_a_failed_start_gives_the_folder_free(folder: Path) -> None:
    with ActivationWriter(folder, 4):
        pass
    with pytest.raises(ValueError, match="width is 4, this writer's 5"):
        ActivationWriter(folder, 5, resume=True)
    with ActivationWriter(folder, 4, resume=True):
        pass


# -- resuming --------------------------------------------------------------------------------


def test_resume_says_where_the_former_run_came_to(folder: Path) -> None:
    with ActivationWriter(folder, 4, metadata={"a": 1}, explicit_shards=True) as writer:
        assert (writer.rows, writer.shards, writer.last_extra) == (0, 0, None)
        writer.write(rows(0, 3), tokens=range(3))
        writer.finish_shard(extra={"next_prompt": 2})
        writer.write(rows(3, 5), tokens=range(3, 5))
        writer.finish_shard(extra={"next_prompt": 5})
    with ActivationWriter(folder, 4, resume=True) as writer:
        assert (writer.rows, writer.shards, writer.pending) == (5, 2, 0)
        assert writer.last_extra == {"next_prompt": 5}
        assert writer.metadata == {"a": 1}
        writer.write(rows(5, 6), tokens=[5])
    shards = ActivationShards(folder)
    assert tokens(folder) == list(range(6))
    assert shards.extras == [{"next_prompt": 2}, {"next_prompt": 5}, None]
    assert [path.name for path in shards.paths] == [f"shard-{n:06d}.safetensors" for n in range(3)]
    with ActivationWriter(folder, 4, metadata={"a": 1}, resume=True) as writer:
        pass
    with pytest.raises(ValueError, match=r"metadata is \{'a': 1\}, this writer's \{'a': 2\}"):
        ActivationWriter(folder, 4, metadata={"a": 2}, resume=True)
    with pytest.raises(ValueError, match="dtype is 'bfloat16', this writer's 'float16'"):
        ActivationWriter(folder, 4, "float16", resume=True)


def test_resume_in_a_new_folder_starts(folder: Path) -> None:
    for start in (0, 2):
        with ActivationWriter(folder, 4, resume=True) as writer:
            assert writer.rows == start
            writer.write(rows(start, start + 2), tokens=range(start, start + 2))
    assert tokens(folder) == [0, 1, 2, 3]


def test_resume_needs_the_listed_shards(folder: Path) -> None:
    with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
        writer.write(rows(0, 4))
    first, second = ActivationShards(folder).paths
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"shard-000001.*has \d+ bytes, the manifest says"):
        ActivationWriter(folder, 4, resume=True)
    first.unlink()
    with pytest.raises(ShardError, match=r"shard-000000.*missing"):
        ActivationWriter(folder, 4, resume=True)


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_a_line_cut_in_half(folder: Path, keep: int) -> None:
    """As if the machine had stopped while the last line was written."""
    with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
        writer.write(rows(0, 6), tokens=range(6))
    manifest = folder / "manifest.jsonl"
    whole = manifest.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    manifest.write_bytes(whole[:start] + whole[start:][:keep])
    with pytest.warns(ManifestWarning, match=r"manifest\.jsonl: the last line was cut in half"):
        shards = ActivationShards(folder)
    assert len(shards) == 4
    with pytest.warns(ManifestWarning, match="cut in half"):
        writer = ActivationWriter(folder, 4, rows_per_shard=2, resume=True)
    with writer:
        assert writer.rows == 4
        writer.write(rows(4, 6), tokens=range(4, 6))
    assert manifest.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens(folder) == list(range(6))


def test_what_a_crash_leaves_is_removed(folder: Path) -> None:
    """A shard that was renamed but not listed, and temporary files."""
    with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
        writer.write(rows(0, 4), tokens=range(4))
    manifest = folder / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:-1]))
    (folder / "shard-000001.safetensors.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    assert tokens(folder) == [0, 1]
    with ActivationWriter(folder, 4, resume=True) as writer:
        assert writer.rows == 2
    assert listing(folder) == [".lock", "manifest.jsonl", "notes.txt", "shard-000000.safetensors"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("shards", [1, 5])
def test_shards_without_their_manifest_are_kept(folder: Path, shards: int, resume: bool) -> None:
    with ActivationWriter(folder, 4, rows_per_shard=1) as writer:
        writer.write(rows(0, shards))
    (folder / "manifest.jsonl").unlink()
    before = contents(folder)
    says = rf"holds shard-000000\.safetensors \({shards} shards in all\) but no manifest\.jsonl"
    for kind in (ActivationWriter, CodeWriter):
        with pytest.raises(FileExistsError, match=says):
            kind(folder, 4, resume=resume)
    assert contents(folder) == before


@pytest.mark.parametrize("tail", [b"", b'{"file": "sh'])
def test_shards_that_an_older_manifest_does_not_list_are_kept(folder: Path, tail: bytes) -> None:
    with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
        writer.write(rows(0, 10), tokens=range(10))
    manifest = folder / "manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + tail)
    (folder / "shard-000004.safetensors.tmp").write_bytes(b"half")
    before = contents(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ManifestWarning)
        with pytest.raises(ShardError, match=r"shard-000003\.safetensors: not listed .* 2 shards"):
            ActivationWriter(folder, 4, resume=True)
    assert contents(folder) == before
    manifest.write_bytes(whole)  # as the message advises
    with ActivationWriter(folder, 4, resume=True) as writer:
        assert writer.rows == 10
    assert tokens(folder) == list(range(10))


@pytest.mark.parametrize("name", ["shard-000123.safetensors", "shard-0000002.safetensors"])
def test_foreign_shards_are_kept(folder: Path, name: str) -> None:
    with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
        writer.write(rows(0, 4), tokens=range(4))
    (folder / name).write_bytes(b"not ours")
    before = contents(folder)
    with pytest.raises(ShardError, match=f"{name}: not listed"):
        ActivationWriter(folder, 4, resume=True)
    assert contents(folder) == before
    (folder / name).unlink()
    with ActivationWriter(folder, 4, resume=True):  # the refusal gave the folder free
        pass


def test_a_crash_before_the_manifest(folder: Path) -> None:
    folder.mkdir()
    for name in (".lock", "manifest.jsonl.tmp", "shard-000000.safetensors.tmp"):
        (folder / name).touch()
    with ActivationWriter(folder, 4) as writer:
        writer.write(rows(0, 1))
    assert listing(folder) == [".lock", "manifest.jsonl", "shard-000000.safetensors"]


# -- ends ------------------------------------------------------------------------------------


def test_an_exception_keeps_accepted_rows(folder: Path) -> None:
    def run() -> None:
        with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
            writer.write(rows(0, 3), tokens=range(3))
            writer.write(with_value(NAN))

    with pytest.raises(NonFiniteError):
        run()
    assert tokens(folder) == [0, 1, 2]
    with ActivationWriter(folder, 4, resume=True) as writer:
        assert writer.rows == 3


def test_an_exception_drops_rows_of_no_explicit_shard(folder: Path) -> None:
    def run() -> None:
        with ActivationWriter(folder, 4, rows_per_shard=1, explicit_shards=True) as writer:
            writer.write(rows(0, 3), tokens=range(3))
            writer.finish_shard({"done": 1})
            writer.write(rows(3, 5), tokens=range(3, 5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert tokens(folder) == [0, 1, 2]
    assert ActivationShards(folder).rows_per_file == [3]
    with ActivationWriter(folder, 4, resume=True) as writer:
        assert (writer.rows, writer.last_extra) == (3, {"done": 1})


def test_extra_without_rows_is_kept(folder: Path) -> None:
    with ActivationWriter(folder, 4) as writer:
        writer.finish_shard()
        writer.finish_shard({"skipped": "prompt 0"})
        writer.write(rows(0, 1), tokens=[7])
    with CodeWriter(folder.with_name("codes"), 4) as code_writer:
        code_writer.finish_shard({"skipped": 0})
    shards = ActivationShards(folder)
    assert (shards.rows_per_file, shards.extras) == ([0, 1], [{"skipped": "prompt 0"}, None])
    assert tokens(folder) == [7]
    shards.verify()
    assert len(CodeShards(folder.with_name("codes"))[:]) == 0


def test_discard(folder: Path) -> None:
    codes = SparseCodes.from_dense(torch.eye(3, 4))
    with CodeWriter(folder, 4) as writer:
        writer.write(codes, tokens=range(3))
        writer.discard()
        assert writer.pending == 0
        writer.write(codes[1:], tokens=[8, 9])
    batch = CodeShards(folder)[:]
    assert batch.tokens.tolist() == [8, 9]
    assert torch.equal(batch.codes.to_dense(), codes[1:].to_dense())


def test_closed_writer(folder: Path) -> None:
    writer = ActivationWriter(folder, 4)
    writer.write(rows(0, 1))
    writer.close()
    writer.close()
    for use in (lambda: writer.write(rows(0, 1)), writer.finish_shard):
        with pytest.raises(ShardError, match="this writer is closed"):
            use()
    assert len(ActivationShards(folder)) == 1


def test_readers_see_finished_shards_of_a_running_writer(folder: Path) -> None:
    with ActivationWriter(folder, 4, rows_per_shard=2) as writer:
        writer.write(rows(0, 5), tokens=range(5))
        early = ActivationShards(folder)
        assert early[:].tokens.tolist() == [0, 1, 2, 3]
    assert len(early) == 4
    assert tokens(folder) == [0, 1, 2, 3, 4]


def test_manifest_is_as_documented(folder: Path) -> None:
    with CodeWriter(folder, 9, {"sae": "ü"}, "bfloat16") as writer:
        writer.write(SparseCodes.from_dense(torch.eye(3, 9)))
    first, second = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {
        "format": "r1sae-shards",
        "version": 1,
        "kind": "codes",
        "d": 9,
        "dtype": "bfloat16",
        "metadata": {"sae": "ü"},
    }
    entry = json.loads(second)
    assert len(entry.pop("xxh3")) == 16
    size = (folder / "shard-000000.safetensors").stat().st_size
    assert entry == {"file": "shard-000000.safetensors", "rows": 3, "bytes": size, "nnz": 3}


# -- the disk --------------------------------------------------------------------------------


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond ``limit`` bytes: EFBIG in place of ENOSPC."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_can_not_grow(folder: Path) -> None:
    """The rows stay with the writer, so that it can go on once there is room."""
    with ActivationWriter(folder, 1024, "float32", rows_per_shard=8) as writer:
        writer.write(torch.zeros(12, 1024), tokens=range(12))
        with (
            largest_file(10_000),
            pytest.raises(OSError, match="nothing half-written is left or listed") as caught,
        ):
            writer.write(torch.ones(6, 1024), tokens=range(12, 18))
        assert caught.value.errno == errno.EFBIG
        assert (writer.rows, writer.pending) == (8, 8)
        assert listing(folder) == [".lock", "manifest.jsonl", "shard-000000.safetensors"]
        assert tokens(folder) == list(range(8))
        writer.finish_shard()
    # 12 to 15 filled the shard that failed; 16 and 17 were not accepted any more.
    assert tokens(folder) == list(range(16))
    ActivationShards(folder).verify()


def leave_with_a_full_disk(folder: Path) -> None:
    with ActivationWriter(folder, 1024, "float32", rows_per_shard=8) as writer:
        writer.write(torch.zeros(12, 1024), tokens=range(12))
        with largest_file(10_000):
            writer.finish_shard()


def test_a_writer_that_gives_up(folder: Path) -> None:
    with pytest.raises(OSError, match="no room for a shard of 4 rows") as caught:
        leave_with_a_full_disk(folder)
    assert caught.value.errno == errno.EFBIG
    assert listing(folder) == [".lock", "manifest.jsonl", "shard-000000.safetensors"]
    with ActivationWriter(folder, 1024, "float32", resume=True) as writer:
        assert writer.rows == 8
        writer.write(torch.zeros(4, 1024), tokens=range(8, 12))
    assert tokens(folder) == list(range(12))


def test_a_manifest_that_can_not_grow(folder: Path) -> None:
    """The shard is on the disk, but its line does not fit: then neither is there."""
    manifest = folder / "manifest.jsonl"
    with ActivationWriter(folder, 1, metadata={"long": "x" * 9000}, rows_per_shard=2) as writer:
        writer.write(torch.zeros(2, 1), tokens=range(2))
        before = manifest.read_bytes()
        with largest_file(len(before) + 50), pytest.raises(OSError, match="no room for a shard"):
            writer.write(torch.zeros(2, 1), tokens=range(2, 4))
        assert manifest.read_bytes() == before
        assert listing(folder) == [".lock", "manifest.jsonl", "shard-000000.safetensors"]
        writer.finish_shard()
    assert tokens(folder) == [0, 1, 2, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_disk_full(small_disk: Path) -> None:
    folder = small_disk / "shards"
    x = torch.zeros(64, 256)  # 64 KiB

    def run() -> None:
        with ActivationWriter(folder, 256, "float32", rows_per_shard=64) as writer:
            for start in range(0, 640, 64):
                writer.write(x, tokens=range(start, start + 64))

    with pytest.raises(OSError, match="no room for a shard of 64 rows") as caught:
        run()
    assert caught.value.errno == errno.ENOSPC
    finished = tokens(folder)
    assert finished == list(range(len(finished)))
    assert 64 <= len(finished) <= 192
    assert not [name for name in listing(folder) if name.endswith(".tmp")]
    ActivationShards(folder).verify()
    for path in ActivationShards(folder).paths[1:]:
        assert path.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        ActivationWriter(tmp_path / "shards", 4)
    tmp_path.chmod(0o700)


def test_threads_may_write_elsewhere_meanwhile(tmp_path: Path) -> None:
    """The GIL is free while shards are written and read: writers in threads don't mix."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            folder = tmp_path / str(number)
            with ActivationWriter(folder, 64, "float32", rows_per_shard=50) as writer:
                for start in range(0, 200, 40):
                    x = torch.full((40, 64), float(number))
                    writer.write(x, tokens=range(start, start + 40), sequence_id=number)
            batch = ActivationShards(folder)[torch.arange(199, -1, -1)]
            assert batch.tokens.tolist() == list(range(199, -1, -1))
            assert bool((batch.activations == number).all())
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_errors_are_of_the_packages_tree() -> None:
    assert issubclass(ShardError, R1SaeError)
    assert issubclass(NonFiniteError, ValueError)
