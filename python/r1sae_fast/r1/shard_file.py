"""One safetensors file: its header, checked against the file, and its tensors, mmap'd.

Format: 8 bytes of length (little endian), a JSON header of that length, the tensors' bytes.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from r1sae_fast.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_AROUND = 2**21  # a page that is read brings neighbours along, up to a huge page of them
_MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """A tensor by its line in the header; ``begin`` and ``end`` count from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name.

    Checks that the file is as long as the header says and that the tensors fill it without
    overlap; reads nothing but the header.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: no safetensors file, or shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER:
                raise CheckpointError(
                    f"{path}: {size} bytes hold no safetensors header; "
                    "the file is truncated or of another kind, fetch it again"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: this shard of the checkpoint is missing; fetch it again"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: the header is not valid JSON; the file is damaged or no safetensors file"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: the header is no JSON object but {type(header).__name__}; "
            "the file is damaged or no safetensors file"
        )
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(path, name, raw, start) for name, raw in header.items()}
    end = max((entry.end for entry in entries.values()), default=start)
    if size != end:
        state = "truncated" if size < end else "longer than it should be"
        raise CheckpointError(
            f"{path}: {size:,} bytes found, its header says {end:,}; "
            f"the shard is {state}, fetch it again"
        )
    _check_order(path, entries, start)
    return entries


def _entry(path: Path, name: str, raw: object, start: int) -> Entry:
    """Checks one line of the header."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: the header is no safetensors header: {name!r} {what}; "
            "the file is damaged, fetch it again"
        )

    if not isinstance(raw, dict):
        raise refuse("is no JSON object")
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("has no two data_offsets")
    if not isinstance(dtype, str):
        raise refuse("has no dtype")
    if not _are_sizes(shape):
        raise refuse("has no shape")
    if dtype in DTYPES:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if nbytes != offsets[1] - offsets[0]:
            raise refuse(
                f"is {dtype} {tuple(shape)}, {nbytes:,} bytes, "
                f"but its data_offsets span {offsets[1] - offsets[0]:,}"
            )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_order(path: Path, entries: dict[str, Entry], start: int) -> None:
    """Tensors follow one another without holes or overlap, as the format demands."""
    at, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlap" if entry.begin < at else "leave a hole"
            raise CheckpointError(
                f"{path}: {before!r} and {name!r} {what}; the file is damaged, fetch it again"
            )
        at, before = entry.end, name


class ShardFile:
    """Reads tensors of one file in place.

    Pages that were read stay in the process's memory until :meth:`release` or the last tensor of
    the file is gone; the system's own cache of the file is another matter, it is given up
    whenever memory is short.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header; raises as :func:`read_header`."""
        self.path = path
        self.entries = read_header(path)
        self._map: mmap.mmap | None = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                if hasattr(mmap, "MAP_PRIVATE"):
                    # Private pages, since torch has no read-only tensors; nothing writes to them,
                    # so no memory need be set aside for copies.
                    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                    prot = mmap.PROT_READ | mmap.PROT_WRITE
                    self._map = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
                else:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map

    def tensor(self, name: str) -> Tensor:
        """The tensor, in place, in its stored dtype; do not write to it.

        Raises:
            CheckpointError: its dtype is none that torch has.
        """
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {name!r} is {entry.dtype}, expected one of {', '.join(DTYPES)}"
            )
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        stored = torch.frombuffer(
            self._mapped(), dtype=torch.uint8, count=entry.nbytes, offset=entry.begin
        )
        if stored.data_ptr() % dtype.itemsize:
            stored = stored.clone()  # written without alignment: allowed, and rare
        return stored.view(dtype).view(entry.shape)

    def will_need(self, name: str) -> None:
        """Tells the system to read the tensor ahead."""
        entry = self.entries[name]
        self._advise("MADV_WILLNEED", entry.begin, entry.end)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Drops the pages of the tensor's bytes ``start`` to ``stop`` from the process's memory;
        tensors still in use read them again from the file."""
        entry = self.entries[name]
        end = entry.end if stop is None else min(entry.begin + stop, entry.end)
        self._advise("MADV_DONTNEED", entry.begin + start - _AROUND, end + _AROUND)

    def _advise(self, advice: str, begin: int, end: int) -> None:
        option = getattr(mmap, advice, None)
        mapped = self._mapped()
        begin, end = max(begin, 0), min(end, len(mapped))
        if option is None or begin >= end:
            return
        begin -= begin % mmap.PAGESIZE
        mapped.madvise(option, begin, end - begin)

    def close(self) -> None:
        """Lets go of the file; tensors that were given out stay valid."""
        self._map = None
