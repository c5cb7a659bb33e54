"""One pass over code shards, which goes on where a killed one stopped."""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from r1sae_fast import _core
from r1sae_fast.examples.ranges import RowRanges
from r1sae_fast.examples.result import Examples, Keep, from_accumulator, read
from r1sae_fast.progress import progress_bar

if TYPE_CHECKING:
    from r1sae_fast.shards import CodeShards

# Codes between two looks at the clock and the progress bar, about a second's: what threads have
# counted is joined after each, and all of a group is lost when it is stopped.
_GROUP_NNZ = 1 << 29


@dataclass(frozen=True)
class ShardFile:
    """One shard, as the manifest lists it."""

    path: Path
    rows: int
    nnz: int
    checksum: str


@dataclass(frozen=True)
class ShardRun:
    """A pass over ``files``, the first row of which has the number ``first_row``."""

    files: list[ShardFile]
    d_sae: int
    keep: Keep
    first_row: int
    threads: int

    @classmethod
    def of(cls, codes: CodeShards, keep: Keep, first_row: int, threads: int) -> ShardRun:
        """A pass over all shards of a folder."""
        files = [
            ShardFile(codes.folder / entry.file, entry.rows, entry.nnz or 0, entry.xxh3)
            for entry in codes._manifest.entries
        ]
        return cls(files, codes.d_sae, keep, first_row, threads)

    def finish(self, checkpoint: Path | None, seconds: float, progress: bool | None) -> Examples:
        """Runs, or goes on from the checkpoint, to the end."""
        accumulator = self._start(checkpoint)
        saved = accumulator.scanned if checkpoint is not None and checkpoint.exists() else -1
        clock = time.monotonic()
        starts = self._starts()
        rows = starts[-1] - starts[0]
        try:
            with progress_bar("collecting examples", rows, unit="rows", shown=progress) as advance:
                advance(accumulator.scanned)
                for group in self._groups(self._done(accumulator)):
                    shards = [(self.files[i].path, starts[i], self.files[i].rows) for i in group]
                    accumulator.add_shards(shards, self.threads)
                    advance(accumulator.scanned)
                    if checkpoint is not None and time.monotonic() - clock >= seconds:
                        self._save(accumulator, checkpoint)
                        saved, clock = accumulator.scanned, time.monotonic()
        finally:
            # Also when stopped by ctrl-c or by a bad shard: a group is added whole or not at all.
            if checkpoint is not None and accumulator.scanned > saved:
                self._save(accumulator, checkpoint)
        return self._examples(accumulator)

    def _examples(self, accumulator: _core.ExampleAccumulator) -> Examples:
        rows = RowRanges()
        rows.add(self.first_row, self.first_row + accumulator.scanned)
        return from_accumulator(accumulator, rows, self.keep.samples, self.keep.seed)

    def _starts(self) -> list[int]:
        """The number of each shard's first row, and of the row after the last."""
        return list(accumulate((file.rows for file in self.files), initial=self.first_row))

    def _done(self, accumulator: _core.ExampleAccumulator) -> int:
        """How many shards the accumulator has seen, told by the rows it has scanned."""
        return bisect_right(self._starts(), self.first_row + accumulator.scanned) - 1

    def _groups(self, done: int) -> Iterator[range]:
        """Ranges of shards that hold enough codes to keep the threads busy."""
        start, nnz = done, 0
        for i in range(done, len(self.files)):
            nnz += self.files[i].nnz
            if nnz >= _GROUP_NNZ or i + 1 == len(self.files):
                yield range(start, i + 1)
                start, nnz = i + 1, 0

    def _digest(self, done: int) -> str:
        """Tells the first ``done`` shards from all others."""
        lines = [
            f"{self.first_row}",
            *(f"{f.path.name} {f.rows} {f.checksum}" for f in self.files[:done]),
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _save(self, accumulator: _core.ExampleAccumulator, path: Path) -> None:
        done = self._done(accumulator)
        header = {"shards_done": str(done), "shards_digest": self._digest(done)}
        self._examples(accumulator).write(path, header)

    def _start(self, path: Path | None) -> _core.ExampleAccumulator:
        if path is None or not path.exists():
            return self.keep.accumulator(self.d_sae)
        examples, header = read(path)
        saved = Keep(examples.n, examples.samples, examples.seed)
        if (examples.d_sae, saved) != (self.d_sae, self.keep):
            raise ValueError(
                f"{path}: this checkpoint is of d_sae = {examples.d_sae} and {_words(saved)}; the "
                f"run is of d_sae = {self.d_sae} and {_words(self.keep)}; delete it or name "
                "another file"
            )
        done = int(header.get("shards_done", "-1"))
        if not 0 <= done <= len(self.files) or header.get("shards_digest") != self._digest(done):
            raise ValueError(
                f"{path}: this checkpoint was made from other shards than these "
                f"{len(self.files)}; delete it or name another file"
            )
        return examples.accumulator()


def _words(keep: Keep) -> str:
    return f"n = {keep.n}, samples = {keep.samples}, seed = {keep.seed}"
