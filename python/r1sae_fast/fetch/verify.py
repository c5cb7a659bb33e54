"""Whether a file is the object that an ETag names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

_READ = 1 << 20
_MIB = 1 << 20
# The sizes of parts that uploading tools take, if not the least that fits.
_USUAL = tuple(size * _MIB for size in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024))


def matches_etag(path: Path, etag: str, advance: Callable[[float], None]) -> bool | None:
    """Whether the content is what the ETag says; None where the ETag doesn't tell.

    S3's ETag is the MD5 of what was uploaded at once; of an upload in N parts it is the MD5 of the
    parts' MD5s, "-N". The parts' size is not told: the usual ones that make N parts are tried,
    all in one reading, and where none fits nothing is known.
    """
    match = re.fullmatch(r'"?([0-9a-f]{32})(?:-([1-9]\d{0,4}))?"?', etag)
    if match is None:
        return None
    size = path.stat().st_size
    if match[2] is None:
        whole = hashlib.md5(usedforsecurity=False)
        for data, done in _read(path):
            whole.update(data)
            advance(done)
        return whole.hexdigest() == match[1]
    parts = int(match[2])
    least = -(-size // parts)
    sizes = {*_USUAL, -(-least // _MIB) * _MIB}
    tried = [_Parts(part) for part in sorted(sizes) if -(-size // part) == parts]
    if not tried:
        return None
    for data, done in _read(path):
        for one in tried:
            one.update(data)
        advance(done)
    return True if any(one.hexdigest() == match[1] for one in tried) else None


class _Parts:
    """The MD5 of the MD5s of parts of one size, a multiple of what is read at a time."""

    def __init__(self, part: int) -> None:
        self._part = part
        self._filled = 0
        self._digests = b""
        self._hash = hashlib.md5(usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self._hash.update(data)
        self._filled += len(data)
        if self._filled == self._part:
            self._end()

    def _end(self) -> None:
        self._digests += self._hash.digest()
        self._hash = hashlib.md5(usedforsecurity=False)
        self._filled = 0

    def hexdigest(self) -> str:
        if self._filled:
            self._end()
        return hashlib.md5(self._digests, usedforsecurity=False).hexdigest()


def _read(path: Path) -> Iterator[tuple[bytes, int]]:
    done = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            done += len(data)
            yield data, done
