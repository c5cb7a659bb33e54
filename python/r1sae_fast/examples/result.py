"""What one pass keeps of every feature, and its file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.atomic import write_bytes

_FORMAT = "r1sae-examples"
_VERSION = "1"
_TENSORS = {
    "strengths": torch.float32,
    "rows": torch.int64,
    "histogram": torch.int64,
    "fixed_sums": torch.int64,
}


def histogram_edges() -> Tensor:
    """The 97 edges of the 96 bins, float32: quarter octaves from 2^-12 to 2^12, in every run.

    Bin ``i`` counts ``edges[i] <= strength < edges[i + 1]``; the first and the last bin also count
    what lies below and above all edges.
    """
    return torch.from_numpy(_core.example_histogram_edges())


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """What one pass keeps of every feature; made by :func:`collect_examples`.

    Attributes:
        strengths: ``[d_sae, n]`` float32, falling; unused slots (a feature active in fewer than n
            rows) are 0.
        rows: ``[d_sae, n]`` int64, the row of each strength, equal strengths by rising row;
            unused slots are -1.
        histogram: ``[d_sae, 96]`` int64, how often each feature was active, by strength; the edges
            are :func:`histogram_edges`.
        fixed_sums: ``[d_sae, 2]`` int64, the exact sum of strengths in units of 2^-64: the bits of
            the low and the high half of an unsigned 128-bit integer. See :attr:`sums`.
        scanned: the number of rows in all, those where nothing was active too.
    """

    strengths: Tensor
    rows: Tensor
    histogram: Tensor
    fixed_sums: Tensor
    scanned: int

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.strengths.shape[0]

    @property
    def n(self) -> int:
        """Slots of each feature."""
        return self.strengths.shape[1]

    @property
    def counts(self) -> Tensor:
        """``[d_sae]`` int64: in how many rows each feature was active."""
        return self.histogram.sum(dim=1)

    @property
    def maxima(self) -> Tensor:
        """``[d_sae]`` float32: each feature's largest strength, 0 where it was never active."""
        return self.strengths[:, 0].clone()

    @property
    def sums(self) -> Tensor:
        """``[d_sae]`` float64: the sum of each feature's strengths.

        Exact to 2^-64 for each activation; sums of 2^64 and more read 2^64.
        """
        halves = self.fixed_sums.numpy().view(np.uint64).astype(np.float64)
        return torch.from_numpy(halves[:, 1] + halves[:, 0] * 2.0**-64)

    @property
    def densities(self) -> Tensor:
        """``[d_sae]`` float64: the share of all rows in which each feature was active."""
        return self.counts.double() / max(self.scanned, 1)

    def merge(self, other: Examples) -> Examples:
        """Examples of the rows of both, exactly as if collected at once.

        The rows of the two must differ. Only the rows kept as examples can be compared, so not
        every overlap is found: rows that stronger ones have pushed out are counted again unseen.

        Raises:
            ValueError: another d_sae or n, or a row that both hold as an example.
        """
        joined = self.accumulator()
        joined.merge(other.accumulator())
        return from_accumulator(joined)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all."""
        self.write(Path(path), {})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Examples:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an examples file, or a damaged one.
        """
        return read(Path(path))[0]

    def equal(self, other: Examples) -> bool:
        """Whether both hold the same in every bit."""
        mine, theirs = self._tensors(), other._tensors()
        return self.scanned == other.scanned and all(
            torch.equal(mine[name], theirs[name]) for name in mine
        )

    def __repr__(self) -> str:
        alive = int((self.histogram.sum(dim=1) > 0).sum())
        return (
            f"Examples(d_sae={self.d_sae}, n={self.n}, scanned={self.scanned}, "
            f"alive={alive}, activations={int(self.histogram.sum())})"
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    def write(self, path: Path, extra: dict[str, str]) -> None:
        """:meth:`save`, with more entries in the file's header."""
        header = {"format": _FORMAT, "version": _VERSION, "scanned": str(self.scanned), **extra}
        write_bytes(path, save(self._tensors(), metadata=header))

    def accumulator(self) -> _core.ExampleAccumulator:
        """The core's copy, to which more rows can be added.

        Raises:
            ValueError: tensors that no collection can have produced.
        """
        return _core.ExampleAccumulator.from_parts(
            self.strengths.numpy(),
            self.rows.numpy(),
            self.histogram.numpy().view(np.uint64),
            self.fixed_sums.numpy().view(np.uint64),
            self.scanned,
        )


def from_accumulator(accumulator: _core.ExampleAccumulator) -> Examples:
    """What the core has collected."""
    strengths, rows, histogram, sums, scanned = accumulator.parts()
    return Examples(
        strengths=torch.from_numpy(strengths),
        rows=torch.from_numpy(rows),
        histogram=torch.from_numpy(histogram.view(np.int64)),
        fixed_sums=torch.from_numpy(sums.view(np.int64)),
        scanned=scanned,
    )


def read(path: Path) -> tuple[Examples, dict[str, str]]:
    """An examples file and its header."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected examples saved by Examples.save")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            if header.get("format") != _FORMAT or header.get("version") != _VERSION:
                raise ValueError(
                    f"{path}: no examples file of version {_VERSION}, its header says "
                    f"{header.get('format')!r}, version {header.get('version')!r}; "
                    "collect the examples again"
                )
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); collect the examples again"
        ) from None
    for name, dtype in _TENSORS.items():
        if tensors[name].dtype != dtype or tensors[name].dim() != 2:
            raise ValueError(
                f"{path}: {name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}; "
                f"expected {dtype} with two dimensions"
            )
    try:
        examples = Examples(**tensors, scanned=int(header["scanned"]))
        examples.accumulator()
    except (KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}; collect the examples again") from None
    return examples, header
