"""The file of hidden states: what a reader finds after any stop, and a disk without room."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.errors import ShardError
from r1sae_fast.r1.stream import scratch
from r1sae_fast.r1.stream.scratch import HIDDEN, STATE, FileHidden, MemoryHidden, ScratchFolder

ROWS, WIDTH = 10, 8
DTYPES = [torch.bfloat16, torch.float32]


def values(block: int, first: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    whole = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 97 + block
    return whole[first : first + rows].to(dtype)


def batches(cuts: list[int]) -> list[tuple[int, int]]:
    ends = sorted({*cuts, ROWS})
    return [(a, b - a) for a, b in zip([0, *ends], ends, strict=False)]


@given(
    cuts=st.lists(st.integers(1, ROWS - 1), max_size=4),
    blocks=st.integers(0, 4),
    more=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_goes_on_from_the_last_finished_block(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    blocks: int,
    more: int,
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("scratch")
    parts = batches(cuts)
    hidden = FileHidden(folder, "pass", ROWS, WIDTH, dtype, 0)
    for block in range(blocks):
        for first, rows in parts:
            hidden.write(first, values(block, first, rows, dtype))
        hidden.finish_block()
    for first, rows in parts[:more]:  # of a block that is not finished
        hidden.write(first, values(50, first, rows, dtype))
    hidden.close()
    again = FileHidden(folder, "pass", ROWS, WIDTH, dtype, 0)
    assert again.blocks == blocks
    if blocks:
        for place, (first, rows) in enumerate(parts):
            assert torch.equal(again.read(first, rows), values(blocks - 1, first, rows, dtype))
            if place + 1 < len(parts):
                again.prefetch(*parts[place + 1])
    again.close()


def test_a_block_reads_what_the_one_before_wrote_while_it_is_on_its_way(tmp_path: Path) -> None:
    for hidden in (
        FileHidden(tmp_path, "pass", ROWS, WIDTH, torch.float32, 0),
        MemoryHidden(ROWS, WIDTH, torch.float32),
    ):
        for block in range(6):
            for first in range(0, ROWS, 5):
                if block:
                    found = hidden.read(first, 5)
                    assert torch.equal(found, values(block - 1, first, 5, torch.float32))
                    hidden.prefetch((first + 5) % ROWS, 5)
                hidden.write(first, values(block, first, 5, torch.float32))
            hidden.finish_block()
        assert hidden.blocks == 6
        hidden.close()


def finished(folder: Path, start: int = 0) -> None:
    hidden = FileHidden(folder, "pass", ROWS, WIDTH, torch.float32, start)
    for _ in range(2):
        hidden.write(0, values(1, 0, ROWS, torch.float32))
        hidden.finish_block()
    hidden.close()


@pytest.mark.parametrize(
    ("identity", "rows", "start", "expected"),
    [
        ("pass", ROWS, 4, 2),
        ("pass", ROWS, 7, 2),
        ("pass", ROWS, 3, 0),  # those rows were not among what was run
        ("other", ROWS, 4, 0),
        ("pass", ROWS + 1, 4, 0),
    ],
)
def test_only_the_same_pass_goes_on(
    tmp_path: Path, identity: str, rows: int, start: int, expected: int
) -> None:
    finished(tmp_path, start=4)
    hidden = FileHidden(tmp_path, identity, rows, WIDTH, torch.float32, start)
    hidden.close()
    assert hidden.blocks == expected
    assert (tmp_path / STATE).exists() == bool(expected)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps({"format": 2, "pass": "pass", "blocks": 2, "start": 0}).encode(),
        json.dumps({"format": 1, "pass": "pass", "blocks": "2", "start": 0}).encode(),
        json.dumps({"format": 1, "pass": "pass", "blocks": True, "start": 0}).encode(),
        json.dumps({"format": 1, "pass": "pass", "blocks": -1, "start": 0}).encode(),
        json.dumps({"format": 1, "pass": "pass", "blocks": 2}).encode(),
    ],
)
def test_a_damaged_state_begins_anew(tmp_path: Path, state: bytes) -> None:
    finished(tmp_path)
    (tmp_path / STATE).write_bytes(state)
    hidden = FileHidden(tmp_path, "pass", ROWS, WIDTH, torch.float32, 0)
    hidden.close()
    assert hidden.blocks == 0
    assert not (tmp_path / STATE).exists()


def test_a_state_without_its_rows_begins_anew(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / HIDDEN).write_bytes(b"short")
    hidden = FileHidden(tmp_path, "pass", ROWS, WIDTH, torch.float32, 0)
    hidden.close()
    assert hidden.blocks == 0


def test_folder(tmp_path: Path) -> None:
    folder = ScratchFolder(tmp_path / "deep" / "scratch")
    with pytest.raises(ShardError):
        ScratchFolder(tmp_path / "deep" / "scratch")
    hidden = folder.open("pass", ROWS, WIDTH, torch.float32)
    hidden.write(0, values(0, 0, ROWS, torch.float32))
    hidden.finish_block()
    hidden.close()
    folder.close()
    assert (tmp_path / "deep" / "scratch" / STATE).exists()  # to go on from
    folder = ScratchFolder(tmp_path / "deep" / "scratch")
    folder.clear()
    folder.close()
    assert list((tmp_path / "deep").iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
import torch
from r1sae_fast.r1.stream.scratch import ScratchFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = ScratchFolder(Path(sys.argv[1]))
try:
    folder.open("pass", 1000, 64, torch.float32)
except OSError as error:
    print(error)
folder.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_disk_without_room_is_told_before_the_start(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "scratch")],
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )
    assert "no room for the hidden states" in run.stdout, run.stdout + run.stderr
    assert "512 kB needed" in run.stdout
    assert "--pass-tokens" in run.stdout
    assert not (tmp_path / "scratch").exists()


def test_clearing_waits_for_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the state of the last block came after it, or found its temporary file gone."""
    begun, written = threading.Event(), scratch.write_bytes

    def slowly(path: Path, data: bytes) -> None:
        path.with_name(path.name + ".tmp").write_bytes(data)
        begun.set()
        threading.Event().wait(0.2)
        assert path.with_name(path.name + ".tmp").exists()
        written(path, data)

    monkeypatch.setattr(scratch, "write_bytes", slowly)
    folder = ScratchFolder(tmp_path / "s")
    hidden = folder.open("pass", ROWS, WIDTH, torch.float32)
    hidden.write(0, values(0, 0, ROWS, torch.float32))
    hidden.finish_block()
    assert begun.wait(60)
    folder.clear()
    hidden.close()
    folder.close()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("bad", [0, 1])
def test_a_block_with_a_write_that_failed_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """The last writes of a block, which nobody waits for before the commit is asked for."""
    hidden = FileHidden(tmp_path, "pass", ROWS, WIDTH, torch.float32, 0)
    for block in range(2):
        for first in (0, 5):
            hidden.write(first, values(block, first, 5, torch.float32))
        hidden.finish_block()
    hidden.wait()
    write, calls = os.pwrite, 0

    def failing(file: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls - 1 == bad:
            raise OSError(errno.EIO, "Input/output error")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    for first in (0, 5):  # fewer than are waited for
        hidden.write(first, values(2, first, 5, torch.float32))
    hidden.finish_block()
    with pytest.raises(OSError, match="Input/output"):
        hidden.close()
    assert json.loads((tmp_path / STATE).read_bytes())["blocks"] == 2
    again = FileHidden(tmp_path, "pass", ROWS, WIDTH, torch.float32, 0)
    assert again.blocks == 2
    assert torch.equal(again.read(0, ROWS), values(1, 0, ROWS, torch.float32))
    again.close()
