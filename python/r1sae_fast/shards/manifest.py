"""The manifest: which shards a folder has. A shard exists once its line is there.

``manifest.jsonl`` opens with a header line and goes on with one line a finished shard::

    {"format": "r1sae-shards", "version": 1, "kind": "activations", "d": 64, ...}
    {"file": "shard-000000.safetensors", "rows": 4096, "bytes": 593920, "xxh3": "0f..."}

A line is there once its newline is. What follows the last newline was cut by a crash: readers
ignore it with a :class:`ManifestWarning`, the next writer removes it and writes its shard again.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from r1sae_fast.errors import ShardError

MANIFEST = "manifest.jsonl"
FORMAT = "r1sae-shards"
VERSION = 1
ACTIVATIONS, CODES = "activations", "codes"
KINDS = {ACTIVATIONS: "ActivationShards", CODES: "CodeShards"}

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_XXH3 = re.compile(r"[0-9a-f]{16}")


class ManifestWarning(UserWarning):
    """The manifest's last line was cut in half by a crash and is ignored."""


@dataclass(frozen=True)
class Header:
    """The first line: what all shards of the folder have in common."""

    kind: str
    d: int
    dtype: str
    metadata: dict[str, Any]

    def to_json(self) -> str:
        """The line, without its newline."""
        fields = {"format": FORMAT, "version": VERSION, "kind": self.kind, "d": self.d}
        return _dump({**fields, "dtype": self.dtype, "metadata": self.metadata})


@dataclass(frozen=True)
class Entry:
    """A further line: one finished shard."""

    file: str
    rows: int
    bytes: int
    xxh3: str
    nnz: int | None = None
    extra: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The line, without its newline."""
        fields: dict[str, Any] = {"file": self.file, "rows": self.rows, "bytes": self.bytes}
        fields["xxh3"] = self.xxh3
        if self.nnz is not None:
            fields["nnz"] = self.nnz
        if self.extra is not None:
            fields["extra"] = self.extra
        return _dump(fields)


@dataclass
class Manifest:
    """A folder's manifest as it is on disk; :meth:`append` keeps both in step."""

    folder: Path
    header: Header
    entries: list[Entry]
    length: int
    """Bytes of the file up to its last newline."""
    torn: bool = False
    """Whether there is anything after that."""

    @property
    def path(self) -> Path:
        """The manifest file."""
        return self.folder / MANIFEST

    @property
    def rows(self) -> int:
        """Rows of all shards together."""
        return sum(entry.rows for entry in self.entries)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks the manifest of ``folder``.

        Raises:
            FileNotFoundError: there is no such folder.
            ShardError: the folder has no manifest, or one that is malformed (the line is named).
        """
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if not folder.exists():
                raise FileNotFoundError(
                    f"{folder}: no such folder; expected a folder of shards with a {MANIFEST}"
                ) from None
            raise ShardError(
                f"{folder}: not a folder of shards (it has no {MANIFEST}); "
                "give the folder that a writer of this package filled"
            ) from None
        *lines, rest = content.split(b"\n")
        if not lines:
            raise ShardError(f"{path}: empty or without a header line; expected a shard manifest")
        header = _header(path, lines[0])
        entries = [_entry(path, number, line) for number, line in enumerate(lines[1:], 2)]
        _reject_repeats(path, entries)
        if rest:
            warnings.warn(
                f"{path}: the last line was cut in half by a crash ({len(rest)} bytes without an "
                "end) and is ignored; the next writer removes it and writes its shard again",
                ManifestWarning,
                stacklevel=4,
            )
        return cls(folder, header, entries, len(content) - len(rest), bool(rest))

    @classmethod
    def create(cls, folder: Path, header: Header) -> Manifest:
        """Writes a manifest without shards, all of it or nothing."""
        line = header.to_json().encode() + b"\n"
        temporary = folder / f"{MANIFEST}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / MANIFEST)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(folder)
        return cls(folder, header, [], len(line))

    def append(self, entry: Entry) -> None:
        """Lists a shard, durably; on an error the file keeps its former lines and no more."""
        line = entry.to_json().encode() + b"\n"
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self.length)
            file.seek(self.length)
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self.length)
                raise
        self.length += len(line)
        self.torn = False
        self.entries.append(entry)

    def truncate(self) -> None:
        """Removes what a crash left after the last newline."""
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self.length)
            os.fsync(file.fileno())
        self.torn = False


def plain_json(name: str, value: Any) -> dict[str, Any]:
    """``value`` as it will come back from the manifest.

    Raises:
        TypeError: not a dict, or something in it that JSON can't say.
        ValueError: a NaN or an infinity, which JSON has no word for.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {type(value).__name__}; expected a dict of JSON values")
    try:
        plain: dict[str, Any] = json.loads(_dump(value))
    except TypeError as error:
        raise TypeError(f"{name} can't be written as JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name} can't be written as JSON: {error}") from None
    return plain


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"{path}: line {number} is not JSON ({error}); restore the manifest from a copy"
        ) from None
    if not isinstance(fields, dict):
        raise ShardError(f"{path}: line {number} is not a JSON object; restore the manifest")
    return fields


def _header(path: Path, line: bytes) -> Header:
    fields = _parse(path, 1, line)
    if fields.get("format") != FORMAT:
        raise ShardError(
            f"{path}: not a shard manifest (its format is {fields.get('format')!r}, "
            f"expected {FORMAT!r}); give a folder that a writer of this package filled"
        )
    if fields.get("version") != VERSION:
        raise ShardError(
            f"{path}: version {fields.get('version')!r} of the shard format, this package reads "
            f"version {VERSION}; use the package that wrote it"
        )
    kind, d, dtype = fields.get("kind"), fields.get("d"), fields.get("dtype")
    metadata = fields.get("metadata", {})
    if kind not in KINDS or not _is_count(d) or d < 1 or not isinstance(dtype, str):
        raise ShardError(
            f"{path}: its header says kind {kind!r}, d {d!r}, dtype {dtype!r}; expected one of "
            f"{sorted(KINDS)}, a positive integer and a name; restore the manifest from a copy"
        )
    if not isinstance(metadata, dict):
        raise ShardError(f"{path}: the header's metadata is not an object; restore the manifest")
    return Header(kind, d, dtype, metadata)


def _entry(path: Path, number: int, line: bytes) -> Entry:
    fields = _parse(path, number, line)
    file, rows, size, xxh3 = (fields.get(key) for key in ("file", "rows", "bytes", "xxh3"))
    nnz, extra = fields.get("nnz"), fields.get("extra")
    if (
        not isinstance(file, str)
        or not _FILE_NAME.fullmatch(file)
        or not _is_count(rows)
        or not _is_count(size)
        or not isinstance(xxh3, str)
        or not _XXH3.fullmatch(xxh3)
        or not (nnz is None or _is_count(nnz))
        or not (extra is None or isinstance(extra, dict))
    ):
        raise ShardError(
            f"{path}: line {number} does not describe a shard; expected file (a plain name), rows, "
            "bytes and xxh3 (16 hex digits); restore the manifest from a copy"
        )
    return Entry(file, rows, size, xxh3, nnz, extra)


def _reject_repeats(path: Path, entries: list[Entry]) -> None:
    seen: set[str] = set()
    for number, entry in enumerate(entries, 2):
        if entry.file in seen:
            raise ShardError(
                f"{path}: line {number} lists {entry.file} again; its rows would count twice; "
                "remove one of the lines"
            )
        seen.add(entry.file)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # folders can't be synced there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
