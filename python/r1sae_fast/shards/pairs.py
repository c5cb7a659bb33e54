"""Two folders of activations, row by row: what a transcoder reads, and what it is to make of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.errors import ShardError
from r1sae_fast.shards.activations import ActivationBatch, ActivationShards
from r1sae_fast.shards.columns import COLUMNS
from r1sae_fast.shards.loader import ShardLoader
from r1sae_fast.shards.rows import Rows

__all__ = ["PairedBatch", "PairedShards"]

_KEPT, _KEPT_BYTES = 4, 256 << 20


@dataclass(frozen=True)
class PairedBatch(ActivationBatch):
    """Some rows, and what is to be made of each."""

    targets: Tensor
    """``[n, d_in]``."""


class PairedShards:
    """Two :class:`ActivationShards` of the same tokens at two points of a model.

    Args:
        inputs: what is encoded; a folder, or open shards.
        targets: what is to be made of it, as many rows in the same order. Tokens, sequences,
            positions and segments are compared as rows are read, where both folders know them.

    Raises:
        FileNotFoundError, ShardError: as for each of them.
        ValueError: another number of rows, or another width.
    """

    def __init__(
        self,
        inputs: ActivationShards | str | os.PathLike[str],
        targets: ActivationShards | str | os.PathLike[str],
    ) -> None:
        self.inputs = inputs if isinstance(inputs, ActivationShards) else ActivationShards(inputs)
        self.targets = (
            targets if isinstance(targets, ActivationShards) else ActivationShards(targets)
        )
        for what, mine, other in (
            ("rows", len(self.inputs), len(self.targets)),
            ("numbers a row (d_in)", self.inputs.d_in, self.targets.d_in),
        ):
            if mine != other:
                raise ValueError(
                    f"{self.targets.folder} has {other:,} {what}, {self.inputs.folder} {mine:,}; "
                    "expected as many: harvest the same prompts at both points"
                )
        self._pool = _core.BufferPool(_KEPT, _KEPT_BYTES)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def folder(self) -> Path:
        """Of the inputs."""
        return self.inputs.folder

    @property
    def d_in(self) -> int:
        """Width of inputs and targets."""
        return self.inputs.d_in

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of both, as they are stored."""
        return self.inputs.row_bytes + self.targets.row_bytes

    @property
    def is_cold(self) -> bool:
        """Whether rows had to come from the disk lately."""
        return self.inputs.is_cold or self.targets.is_cold

    @property
    def metadata(self) -> dict[str, Any]:
        """What the writer of the inputs was told of them."""
        return self.inputs.metadata

    @property
    def fingerprint(self) -> str:
        """Of both."""
        return f"{self.inputs.fingerprint}>{self.targets.fingerprint}"

    def will_be_read(self, start: int, stop: int) -> None:
        """Asks the system to fetch rows from the disk, without waiting for them. A hint."""
        self.inputs.will_be_read(start, stop)
        self.targets.will_be_read(start, stop)

    def gather(
        self, rows: Rows, pool: _core.BufferPool, *, pin_memory: bool = False
    ) -> PairedBatch:
        """Rows of both, as :meth:`ActivationShards.gather` gives them.

        Raises:
            ShardError: a row is of one token here and of another there.
        """
        batch = self.inputs.gather(rows, pool, pin_memory=pin_memory)
        aims = self.targets.gather(rows, self._pool, pin_memory=pin_memory)
        for name, (_, _, unknown) in COLUMNS.items():
            here, there = getattr(batch, name), getattr(aims, name)
            if torch.equal(here, there):
                continue
            differs = (here != there) & (here != unknown) & (there != unknown)
            if bool(differs.any()):
                at = int(differs.nonzero()[0])
                row = rows[0] + at if isinstance(rows, tuple) else int(rows[at])
                raise ShardError(
                    f"row {row} has {name} {int(here[at])} in {self.inputs.folder} but "
                    f"{int(there[at])} in {self.targets.folder}: they are not of the same tokens; "
                    "harvest the same prompts, with the same settings, at both points"
                )
        columns = {name: getattr(batch, name) for name in COLUMNS}
        return PairedBatch(batch.activations, **columns, targets=aims.activations)

    def loader(
        self,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        *,
        drop_last: bool = False,
        epochs: int | None = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> ShardLoader:
        """:class:`PairedBatch` es: all rows, each once an epoch; see :class:`ShardLoader`."""
        return ShardLoader(
            self,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            epochs=epochs,
            prefetch=prefetch,
            pin_memory=pin_memory,
            part=part,
        )
