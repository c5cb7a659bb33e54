"""The micro-batches of a pass: which sequences go through a block together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.r1.generate import pad_right
from r1sae_fast.r1.stream.plan import Shape


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive sequences, padded on the right.

    Attributes:
        first: row of its first token among the pass's rows (padding included).
        sequences: their token ids.
        length: to which they are padded.
    """

    first: int
    sequences: Sequence[Sequence[int]]
    length: int

    @property
    def rows(self) -> int:
        """With padding."""
        return len(self.sequences) * self.length

    def tokens(self) -> Tensor:
        """[sequences, length] on the CPU."""
        return pad_right(self.sequences, torch.device("cpu"), self.length)

    def present(self, device: torch.device) -> Tensor:
        """[sequences, length], False at padding."""
        lengths = torch.tensor([len(sequence) for sequence in self.sequences], device=device)
        return torch.arange(self.length, device=device) < lengths[:, None]


def micro_batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    width_of: Callable[[Sequence[Sequence[int]]], int],
) -> list[MicroBatch]:
    """As the resident engine makes them: what is batched with what, and padded how far, decides
    the last bits."""
    batches: list[MicroBatch] = []
    first = 0
    for start in range(0, len(sequences), batch_size):
        together = sequences[start : start + batch_size]
        batch = MicroBatch(first, together, width_of(together))
        batches.append(batch)
        first += batch.rows
    return batches


def shape_of(batches: Sequence[MicroBatch]) -> Shape:
    """What a plan needs to know of them."""
    return Shape(
        sum(len(sequence) for batch in batches for sequence in batch.sequences),
        tuple((len(batch.sequences), batch.length) for batch in batches),
    )


def identity(settings: str, batches: Sequence[MicroBatch]) -> str:
    """Hex digits that tell a pass from any other: all that its hidden states depend on."""
    digest = hashlib.sha256(settings.encode())
    for batch in batches:
        digest.update(f"|{len(batch.sequences)}x{batch.length}".encode())
        for sequence in batch.sequences:
            digest.update(f";{len(sequence)}:".encode())
            digest.update(torch.tensor(sequence, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()
