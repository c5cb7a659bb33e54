"""What both writers do: buffer rows, finish shards, list them, keep the folder to themselves."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.errors import ShardError
from r1sae_fast.shards.columns import COLUMNS, IntColumn, to_column
from r1sae_fast.shards.manifest import MANIFEST, Entry, Header, Manifest, plain_json
from r1sae_fast.shards.rows import as_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

_OURS = re.compile(r"\.lock|manifest\.jsonl(\.tmp)?|shard-\d{6,}\.safetensors(\.tmp)?")
_SHARD = re.compile(r"shard-\d{6,}\.safetensors")
_TEMPORARY = re.compile(r"shard-\d{6,}\.safetensors\.tmp")
# Bytes that a buffer begins with; and what is reserved for a whole shard at once, at most.
_RESERVED, _MOST_RESERVED = 16 << 20, 512 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Growing:
    """A buffer of rows, used again for every shard. Rows are copied into it once, unless a shard
    outgrows what was reserved: then it doubles, up to a limit that is never exceeded.

    What is reserved takes no memory before it is written to.
    """

    def __init__(self, width: tuple[int, ...], dtype: torch.dtype) -> None:
        self._rows = torch.empty((0, *width), dtype=dtype)
        self._row_bytes = max(1, math.prod(width) * dtype.itemsize)

    def put(self, start: int, rows: Tensor, limit: int | None = None) -> None:
        """Copies ``rows``, of any dtype and device, to ``start`` and on."""
        stop = start + rows.shape[0]
        if stop > self._rows.shape[0]:
            capacity = max(stop, 2 * self._rows.shape[0], _RESERVED // self._row_bytes)
            if limit is not None:
                whole = limit * self._row_bytes <= _MOST_RESERVED
                capacity = max(stop, limit if whole else min(capacity, limit))
            grown = torch.empty((capacity, *self._rows.shape[1:]), dtype=self._rows.dtype)
            grown[:start] = self._rows[:start]
            self._rows = grown
        self._rows[start:stop] = rows

    def get(self, stop: int) -> Tensor:
        """The first ``stop`` rows, not copied."""
        return self._rows[:stop]


class FolderWriter:
    """A folder of shards that is being written. One writer a folder, and one thread a writer.

    Use as a context manager. Leaving it finishes the last shard. Leaving it by an exception does
    too (rows that were accepted are not lost), except with ``explicit_shards``, where rows that no
    ``finish_shard`` closed are dropped, so that each listed shard is one that the caller closed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        header: Header,
        *,
        same_metadata: bool,
        rows_per_shard: int,
        explicit_shards: bool,
        resume: bool,
    ) -> None:
        if isinstance(rows_per_shard, bool) or not isinstance(rows_per_shard, int):
            raise TypeError(f"rows_per_shard is {rows_per_shard!r}; expected an int")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; expected at least 1")
        self._rows_per_shard = rows_per_shard
        self._explicit = explicit_shards
        self._pending = 0
        self._unsure = False
        self._columns = {name: Growing((), dtype) for name, (dtype, _, _) in COLUMNS.items()}
        self._lock: _core.FolderLock | None = None
        path = Path(os.path.abspath(folder))
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _core.FolderLock(path)
        try:
            self._manifest = _open_manifest(path, header, same_metadata, resume)
        except BaseException:
            lock.release()
            raise
        self._lock = lock

    @property
    def folder(self) -> Path:
        """Where the shards go."""
        return self._manifest.folder

    @property
    def metadata(self) -> dict[str, Any]:
        """What the header says of the data."""
        return self._manifest.header.metadata

    @property
    def rows(self) -> int:
        """Rows in finished shards; those of an interrupted run too, when resuming."""
        return self._manifest.rows

    @property
    def pending(self) -> int:
        """Rows that were accepted and are not yet in a finished shard."""
        return self._pending

    @property
    def shards(self) -> int:
        """Number of finished shards."""
        return len(self._manifest.entries)

    @property
    def last_extra(self) -> dict[str, Any] | None:
        """The ``extra`` of the last finished shard, to go on from when resuming."""
        return self._manifest.entries[-1].extra if self._manifest.entries else None

    def finish_shard(self, extra: Mapping[str, Any] | None = None) -> None:
        """Closes the current shard: when this returns it is on the disk and listed.

        Without pending rows nothing happens, unless there is an ``extra`` to keep: then a shard
        without rows is listed.

        Args:
            extra: JSON values kept in the shard's line of the manifest.

        Raises:
            OSError: the disk is full or fails; nothing of the shard is listed, its rows stay
                pending, and the call can be repeated.
        """
        self._require_open()
        plain = None if extra is None else plain_json("extra", dict(extra))
        if self._pending == 0 and plain is None:
            return
        rows = self._pending
        name = _shard_name(self.shards)
        columns = [
            (column, dtype, [rows], as_bytes(self._columns[column].get(rows)))
            for column, (_, dtype, _) in COLUMNS.items()
        ]
        path = self.folder / name
        self._unsure = True
        try:
            size, xxh3 = _core.write_shard(path, [*self._tensors(rows), *columns])
            try:
                self._manifest.append(Entry(name, rows, size, xxh3, self._nnz(), plain))
            except Exception:
                path.unlink(missing_ok=True)
                raise
        except Exception as error:
            self._unsure = False  # on the disk all is as before
            if isinstance(error, OSError) and error.errno in _FULL:
                raise OSError(
                    error.errno,
                    f"{error.strerror or error}; no room for a shard of {rows} rows in "
                    f"{self.folder}: nothing half-written is left or listed; free some space and "
                    "go on with resume=True",
                ) from error
            raise
        self._reset()
        self._unsure = False

    def close(self) -> None:
        """Finishes the last shard and gives the folder free. Closing twice is fine."""
        if self._lock is None:
            return
        try:
            if not self._unsure:
                self.finish_shard()
        finally:
            self._release()

    def discard(self) -> None:
        """Drops the pending rows."""
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A full disk is not tried twice: the error that is on its way says so already.
        failed = isinstance(error, OSError) and error.errno in _FULL
        if error is not None and (self._explicit or failed):
            self._release()
        else:
            self.close()

    # -- for the two writers ------------------------------------------------------------------

    def _tensors(self, rows: int) -> list[tuple[str, str, list[int], Any]]:
        """The pending tensors besides the columns: name, dtype, shape, bytes."""
        raise NotImplementedError

    def _nnz(self) -> int | None:
        return None

    def _reset(self) -> None:
        self._pending = 0

    def _prepare(self, rows: int, columns: Mapping[str, IntColumn]) -> dict[str, Tensor]:
        """Checks all columns before a row is accepted."""
        return {name: to_column(name, columns[name], rows) for name in COLUMNS}

    def _put_columns(self, columns: Mapping[str, Tensor], rows: slice) -> None:
        for name, column in columns.items():
            self._columns[name].put(self._pending, column[rows], self._limit)

    @property
    def _limit(self) -> int | None:
        """Most rows of a shard."""
        return None if self._explicit else self._rows_per_shard

    def _room(self, rows: int) -> int:
        """How many of ``rows`` rows go into the current shard."""
        return rows if self._limit is None else min(rows, self._limit - self._pending)

    def _finish_if_full(self) -> None:
        if self._limit is not None and self._pending >= self._limit:
            self.finish_shard()

    def _require_open(self) -> None:
        if self._lock is None:
            raise ShardError(
                f"{self._manifest.folder}: this writer is closed; open another with resume=True"
            )
        if self._unsure:
            raise ShardError(
                f"{self._manifest.folder}: this writer was interrupted while it finished a shard; "
                "close it and open another with resume=True"
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _refuse_foreign(folder: Path) -> None:
    """Refuses a folder with other people's files, before anything is written to it."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder; give a folder for the shards")
    if not folder.exists() or (folder / MANIFEST).exists():
        return
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise FileExistsError(
            f"{folder}: not empty and not a folder of shards (it holds {foreign[0]!r}); "
            "give an empty or a new folder"
        )
    # The manifest comes before the first shard, so no crash of a writer leaves this.
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        raise FileExistsError(
            f"{folder}: holds {shards[0]} ({len(shards)} shards in all) but no {MANIFEST}; "
            f"restore the {MANIFEST}, or give an empty or a new folder"
        )


def _open_manifest(folder: Path, header: Header, same_metadata: bool, resume: bool) -> Manifest:
    """The manifest to go on with, cleared of what a crash left."""
    if not (folder / MANIFEST).exists():
        _remove_leftovers(folder, [])
        return Manifest.create(folder, header)
    if not resume:
        raise FileExistsError(
            f"{folder}: holds shards already; give another folder, or resume=True to append"
        )
    manifest = Manifest.read(folder)
    _require_same(folder, manifest.header, header, same_metadata)
    for number, entry in enumerate(manifest.entries):
        path = folder / entry.file
        size = path.stat().st_size if path.exists() else None
        if size != entry.bytes:
            found = "missing" if size is None else f"has {size} bytes"
            raise ShardError(
                f"{path}: {found}, the manifest says {entry.bytes} bytes; restore the file "
                "before appending"
            )
        if entry.file != _shard_name(number):
            raise ShardError(
                f"{path}: shard number {number} of the manifest is named otherwise than this "
                "writer would; append to a folder that it wrote"
            )
    _remove_leftovers(folder, manifest.entries)
    if manifest.torn:
        manifest.truncate()
    return manifest


def _require_same(folder: Path, found: Header, wanted: Header, same_metadata: bool) -> None:
    pairs = [
        ("kind", found.kind, wanted.kind),
        ("width", found.d, wanted.d),
        ("dtype", found.dtype, wanted.dtype),
    ]
    if same_metadata:
        pairs.append(("metadata", found.metadata, wanted.metadata))
    for name, there, here in pairs:
        if there != here:
            raise ValueError(
                f"{folder}: can't be resumed: its {name} is {there!r}, this writer's {here!r}; "
                "use the same, or another folder"
            )


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def _remove_leftovers(folder: Path, entries: Sequence[Entry]) -> None:
    """Removes what a crash leaves: temporary files, and the one shard that was not yet listed.

    A writer lists each shard before it writes the next, so any other unlisted shard tells that
    lines of the manifest are lost. Then nothing is removed.
    """
    following = _shard_name(len(entries))
    known = {following, *(entry.file for entry in entries)}
    names = sorted(path.name for path in folder.iterdir())
    unlisted = [name for name in names if _SHARD.fullmatch(name) and name not in known]
    if unlisted:
        raise ShardError(
            f"{folder / unlisted[0]}: not listed by the manifest, which has {len(entries)} shards; "
            f"a crash leaves at most {following} unlisted, so nothing was removed; restore the "
            f"latest {MANIFEST}, or move unlisted shards out of the folder"
        )
    for name in names:
        if name == following or _TEMPORARY.fullmatch(name):
            (folder / name).unlink()
