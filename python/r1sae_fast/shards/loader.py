"""Batches in a shuffled order that can be stopped and resumed exactly.

The order of an epoch is a full permutation of all rows by a keyed bijection (a Feistel network,
``rust/core/src/shard/order.rs``): it depends on the number of rows, the seed and the epoch, and on
nothing else (neither batch size nor shards nor threads), takes no memory, and any place of it can
be computed alone. A state is therefore just an epoch and a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from r1sae_fast import _core

if TYPE_CHECKING:
    from r1sae_fast.shards.activations import ActivationBatch, ActivationShards

_U64 = 2**64


class ShardLoader:
    """Iterates over the rows of an :class:`ActivationShards` in batches, each row once an epoch.

    One ``for`` loop runs through ``epochs`` epochs (``None``: without end), each in an order of its
    own; the next loop goes on with further epochs. A loop that is left early is continued by the
    next one, as is a state that was loaded.

    Args:
        shards: where the rows are.
        batch_size: rows of a batch; an epoch's last batch may have fewer.
        shuffle: False keeps the order of the shards.
        seed: from 0 to 2**64 - 1.
        drop_last: leave out an epoch's last batch if it has fewer rows.
        epochs: of one loop.
    """

    def __init__(
        self,
        shards: ActivationShards,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        epochs: int | None = 1,
    ) -> None:
        _require_int("batch_size", batch_size, 1, 2**62)
        _require_int("seed", seed, 0, _U64 - 1)
        if epochs is not None:
            _require_int("epochs", epochs, 1, 2**62)
        self.shards = shards
        self.batch_size = batch_size
        self.shuffle = bool(shuffle)
        self.seed = seed
        self.drop_last = bool(drop_last)
        self.epochs = epochs
        self._epoch = 0
        self._row = 0

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
        while True:
            start = self._row
            stop = min(start + self.batch_size, len(self.shards))
            if stop == start or (self.drop_last and stop - start < self.batch_size):
                self._epoch, self._row = self._epoch + 1, 0
                if self.epochs is not None and self._epoch % self.epochs == 0:
                    return
                continue
            # Counted before it is handed out: a state saved in the loop's body includes it,
            # and one saved with the last batch resumes to a loop that is over.
            self._row = stop
            yield self._batch(self._epoch, start, stop)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batches handed out so far. Plain JSON values."""
        return {
            "version": 1,
            "rows": len(self.shards),
            "fingerprint": self.shards.fingerprint,
            "shuffle": self.shuffle,
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
        missing = sorted(mine.keys() - state.keys())
        if missing:
            raise ValueError(f"not a loader's state: it has no {missing[0]!r}")
        for name in ("version", "rows", "fingerprint", "shuffle", "seed"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"the loader's state has {name} {state[name]!r}, this loader {mine[name]!r}; "
                    "resume with the same shards, seed and shuffle, or start anew"
                )
        epoch, row = state["epoch"], state["row"]
        _require_int("the state's epoch", epoch, 0, _U64 - 1)
        _require_int("the state's row", row, 0, len(self.shards))
        self._epoch, self._row = epoch, row

    def _batch(self, epoch: int, start: int, stop: int) -> ActivationBatch:
        if not self.shuffle:
            return self.shards[start:stop]
        return self.shards[_core.permutation(len(self.shards), self.seed, epoch, start, stop)]

    def _batches_an_epoch(self) -> int:
        rows = len(self.shards)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an int")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected {low} to {high}")
