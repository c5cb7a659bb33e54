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

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.atomic import replacing
from r1sae_fast.errors import CheckpointError
from r1sae_fast.harvest.sequences import HarvestSequence, item_bytes, plain, read_given
from r1sae_fast.harvest.settings import harvest_metadata
from r1sae_fast.prompts import Item, read_prompts
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.shards import ActivationBatch
from r1sae_fast.shards.columns import COLUMNS

__all__ = ["FILES", "EngineRows", "MixingLoader"]

Texts = Path | str | Sequence[Item] | Callable[[], Iterable[Item]]
"""A file of prompts, texts, or a function that gives them from the first one each time."""

FILES = "buffer-*.safetensors"
"""In a run's folder: the buffer's contents after the filling of that number."""
_ST_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class EngineRows:
    """What an engine makes of texts, to train on in place of :class:`ActivationShards`.

    Args:
        engine: not loaded further than ``layer``, best; without taps. As far as training waits for
            it, it has the machine to itself.
        texts: as a harvest in mode "prefill" takes them: a file (``.txt``, ``.jsonl``), a list of
            texts, conversations or token ids, or a function that gives such. Gone through again as
            often as the training needs; they must be the same each time.
        layer: block whose output is trained on.
        buffer_rows: size of the mixing buffer, at least twice a batch of the training and a
            sequence; its memory is ``buffer_rows * (d_in * size of a number + 17)`` bytes, to which
            come the outputs of one batch of sequences.
        batch_size: sequences that run together.

    Raises:
        FileNotFoundError, TypeError, ValueError: no such file or layer, or a bad number.
    """

    def __init__(
        self,
        engine: Engine,
        texts: Texts,
        layer: int,
        *,
        buffer_rows: int = 1 << 17,
        batch_size: int = 64,
    ) -> None:
        engine.check_layer(layer)
        if getattr(engine, "attached", ()):
            raise ValueError("the engine has taps attached; train outside the with block")
        for name, value in (("buffer_rows", buffer_rows), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; expected an int")
        if buffer_rows < 2:
            raise ValueError(f"buffer_rows is {buffer_rows}; expected at least 2")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.folder = Path("texts")
        """What messages call the source."""
        self._texts: Callable[[], Iterable[Item]]
        if isinstance(texts, (str, Path)):
            self.folder = Path(texts)
            read_prompts(texts)  # that it is there
            self._texts = partial(read_prompts, texts)
        elif callable(texts):
            self._texts = texts
        elif isinstance(texts, Sequence):
            self._texts = partial(iter, texts)
        else:
            raise TypeError(
                f"texts are {type(texts).__name__}; expected a file, a list, or a function that "
                "gives them from the first one each time it is called"
            )
        self.engine, self.layer = engine, layer
        self.buffer_rows, self.batch_size = buffer_rows, batch_size
        self._first: MixingLoader | None = None
        self._given_away = False

    @property
    def d_in(self) -> int:
        """Width of the rows."""
        return self.engine.hidden_size

    @property
    def metadata(self) -> dict[str, Any]:
        """What decides the rows besides the texts, as in the manifest of a harvest."""
        settings = harvest_metadata(
            self.engine, self.layer, "prefill", self.batch_size, Sampling(1, 1.0, 1.0, 0, True)
        )
        return {**settings, "buffer_rows": self.buffer_rows}

    @property
    def fingerprint(self) -> str:
        """16 hex digits of :attr:`metadata`; the texts are told apart as they are read."""
        text = json.dumps(self.metadata, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def sequences(self) -> Iterator[tuple[Item, HarvestSequence]]:
        """The texts from the first, and what the model reads of each."""
        for number, item in enumerate(map(plain, self._texts())):
            yield item, read_given(self.engine, item, number)

    def draw(self, rows: int, seed: int) -> ActivationBatch:
        """The first ``rows`` rows of the first filling, in its shuffled order, or all it has; the
        loader that follows has them in its buffer already."""
        if self._first is None or self._first.seed != seed or not self._first.is_at_start:
            self._first, self._given_away = MixingLoader(self, 1, seed=seed), False
        return self._first.peek(rows)

    def loader(
        self,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        *,
        drop_last: bool = False,
        epochs: int | None = 1,
        pin_memory: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> MixingLoader:
        """Batches of all rows, each row once an epoch; see :class:`MixingLoader`.

        Raises:
            ValueError: an order or a part that only shards have, or batches for which the buffer
                is too small.
        """
        if not shuffle or part != (0, 1):
            raise ValueError(
                "rows of an engine come shuffled, and to one process; harvest shards for "
                f"{'an order' if not shuffle else 'several processes'} of your own"
            )
        del pin_memory  # batches are new memory each: nothing would be gained
        loader = self._first
        if loader is None or self._given_away or loader.seed != seed or not loader.is_at_start:
            loader = MixingLoader(self, batch_size, seed=seed)
        else:
            self._given_away = True
        loader.set_batches(batch_size, drop_last=drop_last, epochs=epochs)
        return loader


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
        engine = self.rows.engine
        for _, rows in engine.rows(tokens, self.rows.layer, batch_size=self.rows.batch_size):
            memory["activations"][places[at : at + len(rows)]] = rows.to("cpu")
            at += len(rows)
        engine.committed()

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
        path = _file(folder, self._fillings)
        if self._buffer is None or path.exists():
            return path
        if self._saved is not None and self._saved != path and self._saved.name == path.name:
            # Another SAE of a sweep has it already.
            with contextlib.suppress(OSError):
                os.link(self._saved, path)
                return path
        tensors = {"order": self._order, **self._buffer}
        header, at = {}, 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.itemsize
            header[name] = {
                "dtype": _stored_name(name, tensor),
                "shape": list(tensor.shape),
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # By hand: the library would make a second buffer first.
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                file.write(tensor.view(torch.uint8).numpy().data)
        self._saved = path
        return path

    def drop_other_buffers(self, folder: Path) -> None:
        """Removes the contents of earlier fillings, once a state of this one is safe."""
        for path in folder.glob(FILES):
            if path != _file(folder, self._fillings):
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
            path = _file(folder, state["fillings"])
            memory = _read(path)
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


def _file(folder: Path, fillings: int) -> Path:
    return folder / FILES.replace("*", f"{fillings:06d}")


def _stored_name(name: str, tensor: Tensor) -> str:
    return (
        "I64"
        if name == "order"
        else COLUMNS[name][1]
        if name in COLUMNS
        else _ST_NAMES[tensor.dtype]
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: they are written to, and the file goes.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the run's mixing buffer is missing or damaged ({error}); train it anew"
        ) from None


def _joined(checksum: str, item: Item) -> str:
    """The checksum of texts that end with ``item``."""
    return hashlib.sha256(checksum.encode() + item_bytes(item)).hexdigest()[:16]
