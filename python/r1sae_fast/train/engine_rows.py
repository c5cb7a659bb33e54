"""What an engine makes of texts, to train on without shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from r1sae_fast.harvest.sequences import HarvestSequence, plain, read_given
from r1sae_fast.harvest.settings import harvest_metadata
from r1sae_fast.prompts import Item, read_prompts
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.shards import ActivationBatch
from r1sae_fast.train.mixing import MixingLoader
from r1sae_fast.train.parallel.ranks import ALONE, Ranks

__all__ = ["EngineRows"]

Texts = Path | str | Sequence[Item] | Callable[[], Iterable[Item]]
"""A file of prompts, texts, or a function that gives them from the first one each time."""


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
        self.ranks: Ranks = ALONE
        """The processes that share the texts out; see :meth:`share`."""
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

    def share(self, ranks: Ranks) -> None:
        """Has each of the ``ranks`` run its share of the texts, and all of them have all rows.

        Each has an engine and these texts, and makes the same calls. What runs with what is as in
        one process, and so are rows and order.
        """
        if ranks is not self.ranks:
            self.ranks, self._first = ranks, None

    @property
    def texts_checksum(self) -> str:
        """Of a file of texts; empty where they come from elsewhere."""
        if not self.folder.is_file():
            return ""
        return hashlib.sha256(self.folder.read_bytes()).hexdigest()[:16]

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
                "rows of an engine come shuffled, and whole to every process (share() has them run "
                f"the texts together); harvest shards for {'parts' if shuffle else 'an order'} of "
                "your own"
            )
        del pin_memory  # batches are new memory each: nothing would be gained
        loader = self._first
        if loader is None or self._given_away or loader.seed != seed or not loader.is_at_start:
            loader = MixingLoader(self, batch_size, seed=seed)
        else:
            self._given_away = True
        loader.set_batches(batch_size, drop_last=drop_last, epochs=epochs)
        return loader
