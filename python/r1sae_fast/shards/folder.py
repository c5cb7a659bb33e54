"""What both readers share: a folder's manifest and its verification."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any, ClassVar

from r1sae_fast import _core
from r1sae_fast.errors import ShardError
from r1sae_fast.shards.manifest import KINDS, Manifest


class ShardFolder:
    """A folder of finished shards, opened for reading."""

    _kind: ClassVar[str]

    def __init__(self, folder: str | os.PathLike[str], dtypes: Container[str]) -> None:
        # Absolute, as files are opened again later, when the working directory may be another.
        self.folder = Path(os.path.abspath(folder))
        self._manifest = Manifest.read(self.folder)
        header = self._manifest.header
        if header.kind != self._kind:
            raise ShardError(
                f"{self.folder}: holds {header.kind}, expected {self._kind}; "
                f"open it with {KINDS[header.kind]}"
            )
        if header.dtype not in dtypes:
            raise ShardError(
                f"{self._manifest.path}: {self._kind} of dtype {header.dtype!r} are not known; "
                "use the package that wrote them, or restore the manifest"
            )
        self._rows = self._manifest.rows

    def __len__(self) -> int:
        return self._rows

    @property
    def metadata(self) -> dict[str, Any]:
        """What the writer was told of the data."""
        return self._manifest.header.metadata

    @property
    def stored_dtype(self) -> str:
        """The manifest's name of the dtype on disk."""
        return self._manifest.header.dtype

    @property
    def paths(self) -> list[Path]:
        """The shard files, in the order of their rows."""
        return [self.folder / entry.file for entry in self._manifest.entries]

    @property
    def rows_per_file(self) -> list[int]:
        """Number of rows of each of :attr:`paths`."""
        return [entry.rows for entry in self._manifest.entries]

    @property
    def extras(self) -> list[dict[str, Any] | None]:
        """What the writer kept with each shard."""
        return [entry.extra for entry in self._manifest.entries]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ when any byte of any shard does (by the listed checksums)."""
        text = "".join(f"{entry.xxh3}:{entry.rows}\n" for entry in self._manifest.entries)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def verify(self, *, progress: bool | None = None) -> None:
        """Reads every byte of every shard and compares it with the manifest's checksums.

        Args:
            progress: show a bar on stderr; default if that is a terminal.

        Raises:
            ShardError: names the files that are damaged, missing or malformed.
        """
        from rich.console import Console
        from rich.progress import track

        hidden = not (sys.stderr.isatty() if progress is None else progress)
        bad: list[str] = []
        for number, entry in track(
            list(enumerate(self._manifest.entries)),
            "verifying shards",
            console=Console(stderr=True),
            disable=hidden,
        ):
            path = self.folder / entry.file
            try:
                size, xxh3 = _core.checksum_file(path)
                if (size, xxh3) != (entry.bytes, entry.xxh3):
                    bad.append(
                        f"{path}: has {size} bytes with checksum {xxh3}, the manifest says "
                        f"{entry.bytes} bytes with {entry.xxh3}"
                    )
                else:
                    self._validate(number)
            except (ShardError, OSError) as error:
                bad.append(str(error))
        if bad:
            count = f"{len(bad)} of {len(self._manifest.entries)} shards are damaged"
            raise ShardError(
                f"{'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''} ({count}); "
                "restore these files or write them again"
            )

    def _validate(self, number: int) -> None:
        """Checks the contents of a shard whose checksum is right."""

    def _listed(self) -> list[tuple[Path, int, int]]:
        return [
            (self.folder / entry.file, entry.rows, entry.bytes) for entry in self._manifest.entries
        ]
