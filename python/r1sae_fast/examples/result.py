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
from r1sae_fast.examples.intervals import Interval, intervals
from r1sae_fast.examples.ranges import RowRanges

_FORMAT = "r1sae-examples"
_VERSION = "2"
_TENSORS = {
    # name: dtype, dimensions
    "strengths": (torch.float32, 2),
    "rows": (torch.int64, 2),
    "histogram": (torch.int64, 2),
    "fixed_sums": (torch.int64, 2),
    "sample_offsets": (torch.int64, 1),
    "sample_strengths": (torch.float32, 1),
    "sample_rows": (torch.int64, 1),
    "row_ranges": (torch.int64, 2),
}
_NUMBERS = ("scanned", "samples", "seed")


@dataclass(frozen=True)
class Keep:
    """What to keep of every feature; see :func:`collect_examples`."""

    n: int
    samples: int
    seed: int

    def accumulator(self, d_sae: int) -> _core.ExampleAccumulator:
        """One that has seen nothing."""
        for name, value, limit in (("samples", self.samples, 255), ("seed", self.seed, 2**64 - 1)):
            if not 0 <= value <= limit:
                raise ValueError(f"{name} is {value}; expected 0 to {limit}")
        return _core.ExampleAccumulator(d_sae, self.n, self.samples, self.seed)


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
        sample_offsets: ``[d_sae + 1]`` int64: the samples of feature f are
            ``sample_offsets[f]:sample_offsets[f + 1]`` of what follows. See :meth:`intervals`.
        sample_strengths: float32, of each feature by rising bin of the histogram.
        sample_rows: int64, of each bin a uniform sample (all rows, if they are at most
            ``samples``), which ``seed`` and the rows alone decide.
        row_ranges: ``[ranges, 2]`` int64, the rows that were scanned: first and one after the last.
        scanned: the number of rows in all, those where nothing was active too.
        samples: the most rows sampled of a bin.
        seed: of the samples.
    """

    strengths: Tensor
    rows: Tensor
    histogram: Tensor
    fixed_sums: Tensor
    sample_offsets: Tensor
    sample_strengths: Tensor
    sample_rows: Tensor
    row_ranges: Tensor
    scanned: int
    samples: int
    seed: int

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

    def intervals(
        self, feature: int, count: int = 5, per_interval: int = 5, by: str = "strength"
    ) -> list[Interval]:
        """Examples of a feature from the whole range of its strengths, weakest interval first.

        Args:
            feature: 0 to d_sae - 1.
            count: at most so many intervals; fewer where they would lie within one bin of the
                histogram, to whose edges theirs are moved.
            per_interval: at most so many examples of each, a uniform sample of the rows in it.
                Fewer are found where ``samples`` is less, or the interval has fewer.
            by: "strength": intervals of the same width from 0 to the largest strength;
                "count": of the same number of activations, as near as the bins allow.

        Raises:
            IndexError: no such feature.
            ValueError: a bad ``count``, ``per_interval`` or ``by``.
        """
        if not 0 <= feature < self.d_sae:
            raise IndexError(f"feature {feature} is out of range for {self.d_sae} features")
        span = slice(int(self.sample_offsets[feature]), int(self.sample_offsets[feature + 1]))
        return intervals(
            self.histogram[feature].numpy(),
            self.sample_strengths[span].numpy(),
            self.sample_rows[span].numpy(),
            (self.samples, self.seed),
            float(self.strengths[feature, 0]),
            (count, per_interval, by),
        )

    def merge(self, other: Examples) -> Examples:
        """Examples of the rows of both, exactly as if collected at once.

        Raises:
            ValueError: another d_sae, n, samples or seed, or rows that both have scanned.
        """
        joined = RowRanges.of_tensor(self.row_ranges)
        for start, stop in other.row_ranges.tolist():
            joined.add(start, stop)
        accumulator = self.accumulator()
        accumulator.merge(other.accumulator())
        return from_accumulator(accumulator, joined, self.samples, self.seed)

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
        same = all(getattr(self, name) == getattr(other, name) for name in _NUMBERS)
        return same and all(torch.equal(mine[name], theirs[name]) for name in mine)

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
        numbers = {name: str(getattr(self, name)) for name in _NUMBERS}
        header = {"format": _FORMAT, "version": _VERSION, **numbers, **extra}
        write_bytes(path, save(self._tensors(), metadata=header))

    def accumulator(self) -> _core.ExampleAccumulator:
        """The core's copy, to which more rows can be added.

        Raises:
            ValueError: tensors that no collection can have produced.
        """
        parts = (
            self.strengths.numpy(),
            self.rows.numpy(),
            self.histogram.numpy().view(np.uint64),
            self.fixed_sums.numpy().view(np.uint64),
            self.sample_offsets.numpy(),
            self.sample_strengths.numpy(),
            self.sample_rows.numpy(),
            self.scanned,
        )
        return _core.ExampleAccumulator.from_parts(parts, self.samples, self.seed)


def from_accumulator(
    accumulator: _core.ExampleAccumulator, rows: RowRanges, samples: int, seed: int
) -> Examples:
    """What the core has collected, of these rows."""
    strengths, ids, histogram, sums, offsets, sampled, sampled_ids, scanned = accumulator.parts()
    return Examples(
        strengths=torch.from_numpy(strengths),
        rows=torch.from_numpy(ids),
        histogram=torch.from_numpy(histogram.view(np.int64)),
        fixed_sums=torch.from_numpy(sums.view(np.int64)),
        sample_offsets=torch.from_numpy(offsets),
        sample_strengths=torch.from_numpy(sampled),
        sample_rows=torch.from_numpy(sampled_ids),
        row_ranges=rows.to_tensor(),
        scanned=scanned,
        samples=samples,
        seed=seed,
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
    for name, (dtype, dimensions) in _TENSORS.items():
        if tensors[name].dtype != dtype or tensors[name].dim() != dimensions:
            raise ValueError(
                f"{path}: {name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}; "
                f"expected {dtype} with {dimensions} dimensions"
            )
    try:
        scanned, samples, seed = (int(header[name]) for name in _NUMBERS)
        examples = Examples(**tensors, scanned=scanned, samples=samples, seed=seed)
        examples.accumulator()
        if RowRanges.of_tensor(examples.row_ranges).count() != examples.scanned:
            raise ValueError(f"its row_ranges are not of {examples.scanned} rows")
    except (KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}; collect the examples again") from None
    return examples, header
