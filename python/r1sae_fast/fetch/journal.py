"""What of a file has been fetched: a journal beside it, so that a cut costs a few pieces at most.

``<file>.part`` has the object's size and holes where nothing has come yet. ``<file>.part.jsonl``
tells which object it is, then one line for each finished piece, with its checksum. A line is added
once the piece is on the disk; a last line that a crash cut in half does not count.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1sae_fast.atomic import write_bytes
from r1sae_fast.fetch.store import Remote

_READ = 1 << 20
# Pieces between two writes of the journal: an fsync a piece would be felt.
_SYNC_BYTES = 64 << 20


class Journal:
    """The unfinished file and its journal. Not for several threads or processes at once.

    Args:
        path: the finished file's.
        remote: the object.
        piece: bytes of a piece, for a file that is begun.
    """

    def __init__(self, path: Path, remote: Remote, piece: int) -> None:
        self.part = path.with_name(path.name + ".part")
        self.file = path.with_name(path.name + ".part.jsonl")
        self._remote = remote
        self.piece = piece
        self.done: dict[int, int] = {}
        self.restarted = False
        self._pending: list[tuple[int, int]] = []
        if self.part.exists() or self.file.exists():
            self._resume()
        if not self.file.exists():
            self._begin()
        self.descriptor = os.open(self.part, os.O_RDWR)
        self._log = self.file.open("r+b")
        self._log.seek(0, os.SEEK_END)

    @property
    def pieces(self) -> int:
        """How many there are."""
        return -(-self._remote.size // self.piece)

    def bounds(self, index: int) -> tuple[int, int]:
        """First byte of a piece, and the one after its last."""
        return index * self.piece, min((index + 1) * self.piece, self._remote.size)

    def check(self) -> Iterator[int]:
        """Reads what is said to be there, and forgets what isn't; yields bytes read."""
        for index, checksum in list(self.done.items()):
            at, end = self.bounds(index)
            found = 0
            while at < end:
                data = os.pread(self.descriptor, min(_READ, end - at), at)
                if not data:
                    break
                found = zlib.crc32(data, found)
                at += len(data)
                yield len(data)
            if found != checksum or at < end:
                del self.done[index]

    def write(self, at: int, data: memoryview) -> None:
        """Puts bytes in their place."""
        while data:
            written = os.pwrite(self.descriptor, data, at)
            at, data = at + written, data[written:]

    def finish(self, index: int, checksum: int) -> None:
        """Notes a piece; on the disk soon, or with :meth:`sync`."""
        self.done[index] = checksum
        self._pending.append((index, checksum))
        if len(self._pending) * self.piece >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Has the pieces, and then their lines, on the disk."""
        if not self._pending:
            return
        os.fsync(self.descriptor)
        lines = (json.dumps({"piece": i, "crc32": c}) + "\n" for i, c in self._pending)
        self._log.write("".join(lines).encode())
        self._log.flush()
        os.fsync(self._log.fileno())
        self._pending.clear()

    def close(self) -> None:
        """Closes both files."""
        try:
            self.sync()
        finally:
            self._log.close()
            os.close(self.descriptor)

    def remove(self) -> None:
        """Removes both files."""
        self.part.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        return {
            "format": "r1sae-fetch",
            "version": 1,
            "name": self._remote.name,
            "size": self._remote.size,
            "etag": self._remote.etag,
        }

    def _begin(self) -> None:
        self.remove()
        with self.part.open("wb") as part:
            part.truncate(self._remote.size)
            os.fsync(part.fileno())
        header = {**self._header(), "piece": self.piece}
        write_bytes(self.file, (json.dumps(header) + "\n").encode())

    def _resume(self) -> None:
        """Reads the journal; what does not fit this object is thrown away."""
        try:
            lines = self.file.read_bytes().split(b"\n")
            header = json.loads(lines[0])
            piece = header.pop("piece")
            fits = header == self._header() and isinstance(piece, int) and piece > 0
            fits = fits and self.part.stat().st_size == self._remote.size
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            fits = False
        if not fits:
            self.remove()
            self.restarted = True
            return
        self.piece = piece
        whole = len(lines[0]) + 1
        for line in lines[1:-1]:  # the last one has no end: empty, or cut in half
            try:
                entry = json.loads(line)
                index, checksum = int(entry["piece"]), int(entry["crc32"])
            except (ValueError, KeyError, TypeError):
                break
            if 0 <= index < self.pieces:
                self.done[index] = checksum
            whole += len(line) + 1
        with self.file.open("r+b") as file:
            file.truncate(whole)
