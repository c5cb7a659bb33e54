"""Batches in a shuffled order that can be stopped and resumed exactly, read ahead by a thread.

The order of an epoch is a full permutation of all rows by a keyed bijection (a Feistel network,
``rust/core/src/shard/order.rs``): it depends on the number of rows, the seed and the epoch, and on
nothing else (neither batch size nor shards nor threads), takes no memory, and any place of it can
be computed alone. A state is therefore just an epoch and a row. With ``blocks`` the order is one of
the same kind that reads the disk in long pieces (``block_order.rs``).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from r1sae_fast import _core

if TYPE_CHECKING:
    from r1sae_fast.shards.activations import ActivationBatch, ActivationShards
    from r1sae_fast.shards.pairs import PairedShards

_U64 = 2**64
# Smaller batches are in memory quicker than a thread is told to fetch them.
_AHEAD_BYTES = 8 << 20


class Place(NamedTuple):
    """A batch of an epoch: rows ``start..stop`` of its order."""

    epoch: int
    start: int
    stop: int


class ShardLoader:
    """Iterates over the rows of :class:`ActivationShards` (or pairs) in batches, each row once an
    epoch.

    One ``for`` loop runs through ``epochs`` epochs (``None``: without end), each in an order of its
    own; the next loop goes on with further epochs. A loop that is left early is continued by the
    next one, as is a state that was loaded.

    A thread reads ``prefetch`` batches ahead, into memory that is used again once the caller has
    dropped a batch and every tensor that shows it: a batch is the caller's own for as long as it is
    held. Rows that have to come from the disk are asked for all at once.

    Args:
        shards: where the rows are.
        batch_size: rows of a batch; an epoch's last batch may have fewer.
        shuffle: False keeps the order of the shards.
        seed: from 0 to 2**64 - 1.
        drop_last: leave out an epoch's last batch if it has fewer rows.
        epochs: of one loop.
        blocks: ``(rows, count)`` shuffles blocks of so many neighbouring rows, then the rows of so
            many blocks at a time, instead of all rows: for data larger than memory on disks whose
            random reads are slow. Each row still comes once an epoch.
        prefetch: batches read ahead; 0 reads each when it is asked for.
        pin_memory: activations in page-locked memory, from which CUDA copies without waiting.
        part: (i, n): of each batch only the i-th of n parts is read, which is for n processes that
            share batches; state and order are those of the whole ones.
    """

    def __init__(
        self,
        shards: ActivationShards | PairedShards,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        epochs: int | None = 1,
        blocks: tuple[int, int] | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        _require_int("batch_size", batch_size, 1, 2**62)
        _require_int("seed", seed, 0, _U64 - 1)
        _require_int("prefetch", prefetch, 0, 1024)
        if epochs is not None:
            _require_int("epochs", epochs, 1, 2**62)
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory is for copies to a CUDA GPU; torch sees none")
        self.shards = shards
        self.batch_size = batch_size
        self.shuffle = bool(shuffle)
        self.seed = seed
        self.drop_last = bool(drop_last)
        self.epochs = epochs
        self.blocks = _checked_blocks(blocks) if self.shuffle else None
        self.prefetch = prefetch
        self.pin_memory = bool(pin_memory)
        _require_int("the number of parts", part[1], 1, 2**31)
        _require_int("part", part[0], 0, part[1] - 1)
        self.part = part
        self._epoch = 0
        self._row = 0
        # The window in blocks that the system was asked for last: its epoch, and where the one
        # behind it begins.
        self._asked: tuple[int, int | None] | None = None
        # What is read ahead, and one that the caller is about to drop.
        self._pool = self._buffers()

    def _buffers(self) -> _core.BufferPool:
        return _core.BufferPool(self.prefetch + 2, 1 << 62)

    def __getstate__(self) -> dict[str, Any]:
        # Buffers are a process's own.
        return {**self.__dict__, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pool = self._buffers()

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of, from 0."""
        return self._epoch

    @property
    def row(self) -> int:
        """How many rows of the epoch are done."""
        return self._row

    def __len__(self) -> int:
        """Batches of one whole loop.

        Raises:
            TypeError: ``epochs`` is None, so there is no end.
        """
        if self.epochs is None:
            raise TypeError("a loader with epochs=None has no end and so no length")
        return self._batches_an_epoch() * self.epochs

    def __iter__(self) -> Iterator[ActivationBatch]:
        if self._batches_an_epoch() == 0:
            return
        ahead = _Ahead(self)
        self._asked = None
        try:
            while True:
                place = self.place_from(self._epoch, self._row)
                if place is None:
                    self._epoch, self._row = self._epoch + 1, 0
                    return
                batch = ahead.get(place)
                # Counted before it is handed out: a state saved in the loop's body includes it,
                # and one saved with the last batch resumes to a loop that is over.
                self._epoch, self._row = place.epoch, place.stop
                yield batch
                # Memory that nobody else holds may be used for the next batch.
                del batch
        finally:
            ahead.close()

    def place_from(self, epoch: int, row: int) -> Place | None:
        """The batch that follows after ``row`` rows of an epoch; None at the end of a loop."""
        for start in (row, 0):
            stop = min(start + self.batch_size, len(self.shards))
            if stop > start and not (self.drop_last and stop - start < self.batch_size):
                return Place(epoch, start, stop)
            epoch += 1
            if self.epochs is not None and epoch % self.epochs == 0:
                break
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batches handed out so far. Plain JSON values."""
        return {
            "version": 1,
            "rows": len(self.shards),
            "fingerprint": self.shards.fingerprint,
            "shuffle": self.shuffle,
            "blocks": None if self.blocks is None else list(self.blocks),
            "seed": self.seed,
            "epoch": self._epoch,
            "row": self._row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state: the next batch starts where that loader's next would have.

        The batch size may differ from that loader's; rows, seed and shuffling may not.

        Raises:
            ValueError: the state is of other data or of another order; nothing is changed.
        """
        mine = self.state_dict()
        state = {"blocks": None} | state  # states of before there was a choice
        missing = sorted(mine.keys() - state.keys())
        if missing:
            raise ValueError(f"not a loader's state: it has no {missing[0]!r}")
        for name in ("version", "rows", "fingerprint", "shuffle", "blocks", "seed"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"the loader's state has {name} {state[name]!r}, this loader {mine[name]!r}; "
                    "resume with the same shards, seed and shuffle, or start anew"
                )
        epoch, row = state["epoch"], state["row"]
        _require_int("the state's epoch", epoch, 0, _U64 - 1)
        _require_int("the state's row", row, 0, len(self.shards))
        self._epoch, self._row = epoch, row

    def read(self, place: Place) -> ActivationBatch:
        """The rows of a place, or this loader's part of them."""
        size, (index, parts) = place.stop - place.start, self.part
        start = place.start + size * index // parts
        stop = place.start + size * (index + 1) // parts
        rows: Any = (start, stop)
        if self.shuffle:
            self._read_windows_ahead(place)
            where = (len(self.shards), self.seed, place.epoch)
            if self.blocks is None:
                rows = _core.permutation(*where, start, stop)
            else:
                rows = _core.block_permutation(*where, self.blocks, start, stop)
        return self.shards.gather(rows, self._pool, pin_memory=self.pin_memory)

    def _read_windows_ahead(self, place: Place) -> None:
        """Has the system fetch the blocks of this place's window and of the one behind it: once a
        window, as soon as it is known that rows come from the disk, wherever the loop began."""
        if self.blocks is None or not self.shards.is_cold:
            return
        where = (len(self.shards), self.seed, place.epoch, self.blocks)
        ranges, following = _core.block_window(*where, place.start)
        before, self._asked = self._asked, (place.epoch, following)
        if before == self._asked:
            return
        wanted = [] if following is None else _core.block_window(*where, following)[0]
        # The window behind another was asked for with that one.
        epoch, behind = before or (None, None)
        was_asked = (
            epoch == place.epoch
            and behind is not None
            and _core.block_window(*where, behind)[1] == following
        )
        for start, stop in wanted if was_asked else ranges + wanted:
            self.shards.will_be_read(start, stop)

    def _batches_an_epoch(self) -> int:
        rows = len(self.shards)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)


class _Ahead:
    """One loop's batches that are being read."""

    def __init__(self, loader: ShardLoader) -> None:
        self._loader = loader
        self._process = os.getpid()
        self._pending: deque[tuple[Place, Future[ActivationBatch]]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        size = loader.batch_size * loader.shards.row_bytes
        if loader.prefetch and (size >= _AHEAD_BYTES or loader.shards.is_cold):
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="r1sae-shards")

    def get(self, place: Place) -> ActivationBatch:
        """The batch at ``place``; begins to read those that follow."""
        # A fork has no thread to wait for.
        if self._thread is None or os.getpid() != self._process:
            return self._loader.read(place)
        # What was read ahead is of no use where the loader was sent elsewhere.
        while self._pending and self._pending[0][0] != place:
            self._pending.popleft()[1].cancel()
        if not self._pending:
            self._begin(place)
        _, future = self._pending.popleft()
        last: Place | None = self._pending[-1][0] if self._pending else place
        while last is not None and len(self._pending) < self._loader.prefetch:
            last = self._loader.place_from(last.epoch, last.stop)
            if last is not None:
                self._begin(last)
        return future.result()

    def _begin(self, place: Place) -> None:
        assert self._thread is not None
        self._pending.append((place, self._thread.submit(self._loader.read, place)))

    def close(self) -> None:
        """Ends the thread; a read that has begun is not waited for."""
        self._pending.clear()
        if self._thread is not None and os.getpid() == self._process:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _checked_blocks(blocks: tuple[int, int] | None) -> tuple[int, int] | None:
    if blocks is None:
        return None
    if not isinstance(blocks, (tuple, list)) or len(blocks) != 2:
        raise TypeError(f"blocks is {blocks!r}; expected (rows of a block, blocks of a window)")
    rows, window = blocks
    _require_int("the rows of a block", rows, 1, 2**31)
    _require_int("the blocks of a window", window, 1, 2**31)
    return rows, window


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an int")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected {low} to {high}")
