"""The hidden states of a pass between two blocks, in a file that a killed run goes on from.

``hidden.bin`` has two halves of [rows, hidden]. A block reads one half and writes the other, so
the half that ``state.json`` speaks of is never written to: it holds the hidden states after the
last finished block. A block is finished when its half is on the disk and then ``state.json`` is
replaced (written beside, synced, renamed).

The file is read and written with pread and pwrite rather than mapped: the system's cache of it
then never counts as this process's memory. All writes and syncs are done by one thread in the
order in which they were asked for, which is what makes that order hold on the disk, while the
next block computes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.atomic import write_bytes
from r1sae_fast.r1.stream.sizes import show_size

STATE, HIDDEN = "state.json", "hidden.bin"
_FORMAT = 1
_IN_FLIGHT = 2  # batches on their way to the disk
_SYNC_BYTES = 256 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Hidden(Protocol):
    """Where the hidden states of a pass are, batch after batch, between two blocks."""

    blocks: int
    """Finished blocks; those of an earlier run too."""

    def read(self, first: int, rows: int) -> Tensor:
        """Rows [first, first + rows) after the finished blocks: [rows, hidden] on the CPU."""

    def prefetch(self, first: int, rows: int) -> None:
        """Says which rows are read next."""

    def write(self, first: int, values: Tensor) -> None:
        """Rows after the block that is being worked on; ``values`` is not to be changed later."""

    def finish_block(self) -> None:
        """All rows have been written."""

    def close(self) -> None:
        """Waits for what is on its way; what is finished stays."""


class MemoryHidden:
    """In memory: nothing outlives the process."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.blocks = 0
        self._rows = torch.empty(rows, width, dtype=dtype)

    def read(self, first: int, rows: int) -> Tensor:
        """See :class:`Hidden`; a copy, since the rows are then overwritten."""
        return self._rows[first : first + rows].clone()

    def prefetch(self, first: int, rows: int) -> None:
        """Nothing to do."""

    def write(self, first: int, values: Tensor) -> None:
        """See :class:`Hidden`."""
        self._rows[first : first + values.shape[0]] = values

    def finish_block(self) -> None:
        """See :class:`Hidden`."""
        self.blocks += 1

    def close(self) -> None:
        """Nothing to do."""


class ScratchFolder:
    """A folder for one run at a time; what is in it belongs to the pass that is under way."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder and locks it.

        Raises:
            ShardError: another run is at work in it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = _core.FolderLock(folder)
        self._hidden: FileHidden | None = None

    def open(
        self, identity: str, rows: int, width: int, dtype: torch.dtype, start: int = 0
    ) -> FileHidden:
        """The hidden states of a pass: as an earlier run left them if it was the same pass
        (``identity``), else new ones. Rows before ``start`` are not going to be asked for.

        Raises:
            OSError: no room on the disk.
        """
        self._hidden = FileHidden(self.folder, identity, rows, width, dtype, start)
        return self._hidden

    def clear(self) -> None:
        """Removes the pass's files: its rows are safe elsewhere."""
        if self._hidden is not None:
            self._hidden.wait()  # or the state of its last block would come after this
        for name in (STATE, STATE + ".tmp", HIDDEN):
            (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the folder free, and removes it if nothing is left to go on from."""
        self._lock.release()
        if not (self.folder / STATE).exists() and not (self.folder / HIDDEN).exists():
            with contextlib.suppress(OSError):  # files of others
                (self.folder / ".lock").unlink(missing_ok=True)
                self.folder.rmdir()


class FileHidden:
    """See the module."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        rows: int,
        width: int,
        dtype: torch.dtype,
        start: int,
    ) -> None:
        self._state, path = folder / STATE, folder / HIDDEN
        self._identity, self._width, self._dtype = identity, width, dtype
        self._half = rows * width * dtype.itemsize
        self.blocks, self._start = _finished_blocks(self._state, identity, start)
        if self.blocks and not (path.is_file() and path.stat().st_size == 2 * self._half):
            self.blocks = 0
        if self.blocks == 0:
            self._start = start
            # Before the first write, so that no state of another pass is ever beside this one's.
            self._state.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if self.blocks == 0:
                _reserve(self._file, 2 * self._half, path)
        except BaseException:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise
        self._writer = ThreadPoolExecutor(1, "r1sae-scratch-write")
        self._reader = ThreadPoolExecutor(1, "r1sae-scratch-read")
        self._writing: deque[Future[None]] = deque()
        self._written: dict[int, Future[None]] = {}
        self._next: tuple[int, int, Future[Tensor]] | None = None
        self._unsynced = 0
        self._failed: BaseException | None = None

    def read(self, first: int, rows: int) -> Tensor:
        """See :class:`Hidden`."""
        following, self._next = self._next, None
        if following is not None and following[:2] == (first, rows):
            return following[2].result()
        return self._submit_read(first, rows).result()

    def prefetch(self, first: int, rows: int) -> None:
        """See :class:`Hidden`."""
        self._next = first, rows, self._submit_read(first, rows)

    def _submit_read(self, first: int, rows: int) -> Future[Tensor]:
        start = (self.blocks % 2) * self._half + first * self._row_bytes
        return self._reader.submit(self._read, self._written.get(first), start, rows)

    @property
    def _row_bytes(self) -> int:
        return self._width * self._dtype.itemsize

    def _read(self, written: Future[None] | None, start: int, rows: int) -> Tensor:
        if written is not None:
            written.result()
        values = torch.empty(rows, self._width, dtype=self._dtype)
        view = _view(values)
        done = 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], start + done)
            if count == 0:
                raise OSError(errno.EIO, f"{self._state.with_name(HIDDEN)}: shorter than it was")
            done += count
        return values

    def write(self, first: int, values: Tensor) -> None:
        """See :class:`Hidden`."""
        while len(self._writing) >= _IN_FLIGHT:
            self._writing.popleft().result()
        start = ((self.blocks + 1) % 2) * self._half + first * self._row_bytes
        future = self._writer.submit(self._write, start, values.contiguous())
        self._writing.append(future)
        self._written[first] = future

    def _write(self, start: int, values: Tensor) -> None:
        self._go_on()
        view = _view(values)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file, view[done:], start + done)
            self._unsynced += len(view)
            if self._unsynced >= _SYNC_BYTES:
                self._sync()
        except BaseException as error:
            self._failed = error
            raise

    def _go_on(self) -> None:
        """What stands in line behind a write that failed must not happen, a commit least of all."""
        if self._failed is not None:
            raise self._failed

    def _sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._file)
        self._unsynced = 0

    def finish_block(self) -> None:
        """See :class:`Hidden`. Returns at once: the commit waits in line behind the writes, and
        the next block's writes, which go over the half before, behind the commit."""
        self.blocks += 1
        self._next = None  # was of the block before
        self._writing.append(self._writer.submit(self._commit, self.blocks))

    def _commit(self, blocks: int) -> None:
        self._go_on()
        self._sync()
        state = {
            "format": _FORMAT,
            "pass": self._identity,
            "blocks": blocks,
            "start": self._start,
        }
        write_bytes(self._state, json.dumps(state).encode())

    def wait(self) -> None:
        """Until all that was asked for is on the disk."""
        while self._writing:
            self._writing.popleft().result()

    def close(self) -> None:
        """See :class:`Hidden`."""
        try:
            self.wait()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._reader.shutdown(cancel_futures=True)
            os.close(self._file)


def _view(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data.cast("B")


def _finished_blocks(state: Path, identity: str, start: int) -> tuple[int, int]:
    """Blocks that all rows from ``start`` on have been through, and the first row that has."""
    try:
        found = json.loads(state.read_bytes())
    except (OSError, ValueError):
        return 0, start
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return 0, start
    blocks, begun = found.get("blocks"), found.get("start")
    if found.get("pass") != identity or type(blocks) is not int or type(begun) is not int:
        return 0, start
    return (blocks, begun) if blocks > 0 and begun <= start else (0, start)


def _reserve(file: int, size: int, path: Path) -> None:
    """Takes the room now, so that a disk that is too small is known before hours of work."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"no room for the hidden states of a pass in {path.parent}: {show_size(size)} needed, "
            f"{show_size(free)} free; free some space, give another folder (--scratch), or make "
            "the pass smaller (--pass-tokens)",
        ) from None
