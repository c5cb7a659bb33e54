"""Rows straight from an engine, mixed in a buffer of bounded size: training without shards.

Texts are run through the engine in order. Their rows go into the free places of a buffer; what it
holds is shuffled; half of it is handed out; then the free half is filled again, and all that is in
it shuffled anew. A row is handed out once an epoch, near its text's turn: half of them within one
filling, all but one in 2^n within n.

The order is a function of the seed and of how many rows and texts came before; the rows are what
the engine makes of the same texts in the same batches. A state is a few numbers and the buffer's
contents, which lie in a file of their own: they change once a filling, not with each checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.errors import CheckpointError
from r1sae_fast.harvest.sequences import HarvestSequence, item_bytes
from r1sae_fast.prompts import Item
from r1sae_fast.shards import ActivationBatch
from r1sae_fast.shards.columns import COLUMNS
from r1sae_fast.train import buffer_file

if TYPE_CHECKING:
    from r1sae_fast.train.engine_rows import EngineRows

__all__ = ["MixingLoader"]


class MixingLoader:
    """Batches of an :class:`EngineRows`, as :class:`r1sae_fast.shards.ShardLoader` gives them.

    One ``for`` loop runs through ``epochs`` epochs (``None``: without end); one that is left early
    is continued by the next. Nothing is run before the first batch is asked for.

    Args:
        rows: where they come from.
        batch_size: rows of a batch, at most half the buffer; an epoch's last one may have fewer.
        seed: of the order.
        drop_last: leave out an epoch's last batch if it has fewer rows.
        epochs: of one loop.
    """

    def __init__(
        self,
        rows: EngineRows,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        epochs: int | None = 1,
    ) -> None:
        self.rows, self.seed = rows, seed
        self.set_batches(batch_size, drop_last=drop_last, epochs=epochs)
        self._buffer: dict[str, Tensor] | None = None
        self._epoch = 0
        self._fillings = 0
        """Of all epochs."""
        self._source: Iterator[tuple[Item, HarvestSequence]] | None = None
        self._waiting: tuple[Item, HarvestSequence] | None = None
        """The next text, for which there was no room."""
        self._texts = 0
        """In the buffer or handed out, of this epoch."""
        self._checksum = ""
        """Over these."""
        self._ended = False
        """Whether the epoch has no more of them."""
        self._order = torch.empty(0, dtype=torch.int64)
        """The buffer's places after a filling, shuffled."""
        self._given = 0
        """How many of them were handed out."""
        self._saved: Path | None = None

    def set_batches(self, batch_size: int, *, drop_last: bool, epochs: int | None) -> None:
        """As for a new loader."""
        if batch_size < 1 or 2 * batch_size > self.rows.buffer_rows:
            raise ValueError(
                f"a batch of {batch_size} rows from a buffer of {self.rows.buffer_rows}; "
                "expected a buffer_rows of at least two batches"
            )
        self.batch_size, self.drop_last, self.epochs = batch_size, drop_last, epochs

    def __iter__(self) -> Iterator[ActivationBatch]:
        whole = not self._texts
        some = False
        while True:
            batch = self._next()
            if batch is not None:
                some = True
                yield batch
                continue
            if not self._texts:
                raise ValueError(f"{self.rows.folder}: no texts to train on")
            if whole and not some and self.epochs is None:
                raise ValueError(
                    f"{self.rows.folder}: the texts make {len(self._order)} rows, fewer than a "
                    f"batch of {self.batch_size}; give more texts, or a smaller batch_size"
                )
            whole, some = True, False
            self._epoch, self._texts, self._checksum, self._ended = self._epoch + 1, 0, "", False
            self._source, self._waiting, self._given = None, None, 0
            self._order = self._order[:0]
            if self.epochs is not None and self._epoch % self.epochs == 0:
                return

    def peek(self, rows: int) -> ActivationBatch:
        """What would be handed out next, at most ``rows`` rows of this filling, without doing so.

        Raises:
            ValueError: no texts.
        """
        if self._given == self._until:
            self._fill()
        if not len(self._order):
            raise ValueError(f"{self.rows.folder}: no texts to train on")
        return self._batch([self._order[self._given : self._given + rows]])

    @property
    def texts(self) -> int:
        """Of this epoch, in the buffer or handed out."""
        return self._texts

    @property
    def is_at_start(self) -> bool:
        """Whether nothing was handed out yet."""
        return self._epoch == 0 and self._given == 0 and self._fillings <= 1

    @property
    def _until(self) -> int:
        """How many rows of this filling are handed out before the next."""
        if self._ended:
            return len(self._order)
        return max(0, len(self._order) - self.rows.buffer_rows // 2)

    def _next(self) -> ActivationBatch | None:
        """The next batch; None where the epoch has none."""
        parts: list[ActivationBatch] = []
        missing = self.batch_size
        while missing:
            if self._given == self._until:
                if self._ended:
                    break
                self._fill()
                continue
            stop = min(self._given + missing, self._until)
            # Copied before the next filling writes over it.
            parts.append(self._batch([self._order[self._given : stop]]))
            missing -= stop - self._given
            self._given = stop
        if not parts or (missing and self.drop_last):
            return None
        if len(parts) == 1:
            return parts[0]
        columns = ("activations", *COLUMNS)
        return ActivationBatch(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in columns}
        )

    def _batch(self, places: list[Tensor]) -> ActivationBatch:
        where = torch.cat(places)
        return ActivationBatch(
            **{name: column.index_select(0, where) for name, column in self._memory().items()}
        )

    def _memory(self) -> dict[str, Tensor]:
        if self._buffer is None:
            size, engine = self.rows.buffer_rows, self.rows.engine
            self._buffer = {
                "activations": torch.empty(size, engine.hidden_size, dtype=engine.dtype)
            }
            for name, (dtype, _, unknown) in COLUMNS.items():
                self._buffer[name] = torch.full((size,), unknown, dtype=dtype)
        return self._buffer

    # -- filling ------------------------------------------------------------------------------

    def _fill(self) -> None:
        held = self._order[self._given :]
        is_free = torch.ones(self.rows.buffer_rows, dtype=torch.bool)
        is_free[held] = False
        free = is_free.nonzero().flatten()
        taken = self._take(len(free))
        used = free[: sum(len(sequence.tokens) for _, sequence in taken)]
        self._run(taken, used)
        places = torch.cat([held, used]).sort().values
        self._fillings += 1
        shuffled = _core.permutation(len(places), self.seed, self._fillings, 0, len(places))
        self._order, self._given = places[torch.from_numpy(shuffled)], 0

    def _take(self, room: int) -> list[tuple[int, HarvestSequence]]:
        """The next texts that ``room`` rows have room for, numbered."""
        if self._source is None:
            self._source = self._from(self._texts, self._checksum)
        taken: list[tuple[int, HarvestSequence]] = []
        while True:
            found = self._waiting or next(self._source, None)
            self._waiting = None
            if found is None:
                self._ended = True
                return taken
            item, sequence = found
            size = len(sequence.tokens)
            if 2 * size > self.rows.buffer_rows:
                raise ValueError(
                    f"text {self._texts} has {size} tokens, more than half of the buffer's "
                    f"{self.rows.buffer_rows} rows; give a larger buffer_rows"
                )
            if size > room:
                self._waiting = found
                return taken
            taken.append((self._texts, sequence))
            self._checksum = _joined(self._checksum, item)
            self._texts += 1
            room -= size

    def _from(self, texts: int, checksum: str) -> Iterator[tuple[Item, HarvestSequence]]:
        """The texts after the first ``texts``, which must be those that were read before."""
        source = self.rows.sequences()
        found = ""
        for number in range(texts):
            before = next(source, None)
            if before is None:
                raise ValueError(
                    f"{self.rows.folder}: there are only {number} texts, but the run has read "
                    f"{texts}; go on with the texts that it was started with"
                )
            found = _joined(found, before[0])
        if found != checksum:
            raise ValueError(
                f"{self.rows.folder}: other texts than those that the run has read; go on with "
                "the texts that it was started with"
            )
        return source

    def _run(self, taken: list[tuple[int, HarvestSequence]], places: Tensor) -> None:
        """Writes the rows of sequences to ``places``."""
        if not taken:
            return
        memory = self._memory()
        tokens = [sequence.tokens for _, sequence in taken]
        lengths = torch.tensor([len(one) for one in tokens])
        numbers = torch.tensor([number for number, _ in taken])
        starts = lengths.cumsum(0) - lengths
        columns = {
            "tokens": torch.tensor([token for one in tokens for token in one]),
            "sequence_id": numbers.repeat_interleave(lengths),
            "position": torch.arange(len(places)) - starts.repeat_interleave(lengths),
            "segment": torch.tensor([part for _, one in taken for part in one.segments]),
        }
        for name, column in columns.items():
            memory[name][places] = column.to(memory[name].dtype)
        at = 0
        for rows in self._made(tokens):
            memory["activations"][places[at : at + len(rows)]] = rows.to("cpu")
            at += len(rows)
        self.rows.engine.committed()

    def _made(self, tokens: list[list[int]]) -> Iterator[Tensor]:
        """Rows of all sequences, in order: this rank runs each n-th batch of them, in turns with
        the others; which sequences run together doesn't depend on that."""
        size, engine, ranks = self.rows.batch_size, self.rows.engine, self.rows.ranks
        index, count = ranks.part
        batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        own = batches[index::count]
        flat = list(itertools.chain.from_iterable(own))
        running = engine.rows(flat, self.rows.layer, batch_size=size) if own else iter(())
        made = torch.empty(0, engine.hidden_size, dtype=engine.dtype)
        for turn in range(-(-len(batches) // count)):
            wanted = sum(map(len, own[turn])) if turn < len(own) else 0
            while len(made) < wanted:  # an engine may give several batches at a time, or one
                _, more = next(running)
                made = torch.cat([made, more.to("cpu")]) if len(made) else more
            yield ranks.rows(made[:wanted], 0)[0]
            made = made[wanted:]

    # -- stopping and going on ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batches handed out so far: plain JSON values, to be kept
        with what :meth:`save_buffer` writes."""
        return {
            "version": 1,
            "fingerprint": self.rows.fingerprint,
            "seed": self.seed,
            "epoch": self._epoch,
            "fillings": self._fillings,
            "texts": self._texts,
            "checksum": self._checksum,
            "ended": self._ended,
            "given": self._given,
            "held": len(self._order),
        }

    def save_buffer(self, folder: Path) -> Path:
        """Writes the buffer's contents, unless those of this filling are there already."""
        path = buffer_file.path_of(folder, self._fillings)
        if self._buffer is not None:
            buffer_file.write(path, {"order": self._order, **self._buffer}, self._saved)
            self._saved = path
        return path

    def drop_other_buffers(self, folder: Path) -> None:
        """Removes the contents of earlier fillings, once a state of this one is safe."""
        for path in folder.glob(buffer_file.FILES):
            if path != buffer_file.path_of(folder, self._fillings):
                path.unlink(missing_ok=True)

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Goes on from a state and the buffer in ``folder``.

        Raises:
            ValueError: the state is of other data or another seed; nothing is changed.
            CheckpointError: the buffer is missing or damaged.
        """
        mine = self.state_dict()
        missing = sorted(mine.keys() - state.keys())
        if missing:
            raise ValueError(f"not a mixing loader's state: it has no {missing[0]!r}")
        for name in ("version", "fingerprint", "seed"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"the loader's state has {name} {state[name]!r}, this loader {mine[name]!r}; "
                    "resume with the same engine, layer, sizes and seed, or start anew"
                )
        order = torch.empty(0, dtype=torch.int64)
        if state["held"]:
            path = buffer_file.path_of(folder, state["fillings"])
            memory = buffer_file.read(path)
            order = memory.pop("order")
            expected = {
                name: (tensor.shape, tensor.dtype) for name, tensor in self._memory().items()
            }
            found = {name: (tensor.shape, tensor.dtype) for name, tensor in memory.items()}
            if found != expected or len(order) != state["held"]:
                raise CheckpointError(f"{path}: not the buffer of this run; train it anew")
            self._buffer = memory
        self._order, self._given = order, int(state["given"])
        self._epoch, self._fillings = int(state["epoch"]), int(state["fillings"])
        self._texts, self._checksum = int(state["texts"]), str(state["checksum"])
        self._ended = bool(state["ended"])
        self._source, self._waiting = None, None


def _joined(checksum: str, item: Item) -> str:
    """The checksum of texts that end with ``item``."""
    return hashlib.sha256(checksum.encode() + item_bytes(item)).hexdigest()[:16]
