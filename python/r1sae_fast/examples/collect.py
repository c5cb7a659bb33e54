"""Collecting examples from codes in memory, or from shards (:mod:`.shard_run`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.examples.ranges import RowRanges
from r1sae_fast.examples.result import Examples, Keep, from_accumulator

if TYPE_CHECKING:
    from r1sae_fast.shards import CodeShards

StrPath: TypeAlias = "str | os.PathLike[str]"
CodeBatches: TypeAlias = "Iterable[SparseCodes | tuple[int, SparseCodes]]"


def collect_examples(
    codes: CodeShards | StrPath | SparseCodes | CodeBatches,
    n: int = 20,
    *,
    samples: int = 4,
    seed: int = 0,
    first_row: int = 0,
    threads: int | None = None,
    checkpoint: StrPath | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool | None = None,
) -> Examples:
    """The n strongest rows of every feature, with counts, sums and histograms.

    Args:
        codes: code shards (a :class:`~r1sae_fast.shards.CodeShards` or its folder), whose rows are
            numbered in the order of the manifest; or one or many :class:`SparseCodes`, whose
            rows are numbered on from ``first_row`` (leading dimensions count as flattened); or
            pairs ``(first_row, SparseCodes)`` in any order, where each batch brings its own number.
        n: examples to keep of each feature, 1 to 65535.
        samples: rows to keep of each bin of a feature's histogram, 0 to 255; see
            :meth:`Examples.intervals`.
        seed: decides, with the rows alone, which ones.
        first_row: the number of the first row; of shards too.
        threads: at most so many; default: all CPUs. They don't change the result.
        checkpoint: a file to which the state is saved now and then, and from which the same call
            goes on after a kill. It may stay: with shards appended since, only those are read.
            For shards only.
        checkpoint_seconds: the least time between two such saves.
        progress: a bar on stderr; default: when stderr is a terminal. For shards only.

    Values of float64 and float16 are taken as float32; a stored zero is no activation.

    Raises:
        NonFiniteError: a NaN or infinite strength; the row is named.
        ShardError: a damaged shard; the file is named.
        ValueError: a negative strength; a feature twice in a row (named); batches that hold the
            same row; codes of another d_sae; no codes at all; a checkpoint of other shards or
            another n; n, samples or seed out of range.
    """
    from r1sae_fast.examples.shard_run import ShardRun
    from r1sae_fast.shards import CodeShards

    if threads is None:
        threads = os.cpu_count() or 1
    elif threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    if isinstance(codes, str | os.PathLike):
        codes = CodeShards(codes)
    if isinstance(codes, CodeShards):
        run = ShardRun.of(codes, Keep(n, samples, seed), first_row, threads)
        saved = None if checkpoint is None else Path(checkpoint)
        return run.finish(saved, checkpoint_seconds, progress)
    if checkpoint is not None:
        raise ValueError(
            "checkpoint needs code shards, which can be read again from where a run stopped; "
            "write the codes with CodeWriter first, or leave checkpoint out"
        )
    return _collect_batches(codes, Keep(n, samples, seed), first_row, threads)


def _collect_batches(
    codes: SparseCodes | CodeBatches, keep: Keep, first_row: int, threads: int
) -> Examples:
    batches: CodeBatches = [codes] if isinstance(codes, SparseCodes) else codes
    accumulator: _core.ExampleAccumulator | None = None
    d_sae = 0
    added = RowRanges()
    for item in batches:
        if isinstance(item, tuple):
            first_row, batch = item
        else:
            batch = item
        if not isinstance(batch, SparseCodes):
            raise TypeError(
                f"codes hold a {type(batch).__name__}; expected SparseCodes, pairs "
                "(first_row, SparseCodes), or CodeShards"
            )
        if accumulator is None:
            d_sae = batch.d_sae
            accumulator = keep.accumulator(d_sae)
        elif batch.d_sae != d_sae:
            raise ValueError(f"codes of d_sae = {batch.d_sae} follow codes of d_sae = {d_sae}")
        added.add(first_row, first_row + batch.rows)
        accumulator.add(*_arrays(batch), first_row, threads)
        first_row += batch.rows
    if accumulator is None:
        raise ValueError("no codes: expected at least one SparseCodes (it may have no rows)")
    return from_accumulator(accumulator, added, keep.samples, keep.seed)


def _arrays(
    codes: SparseCodes,
) -> tuple[
    NDArray[np.float32] | NDArray[np.uint16],
    NDArray[np.uint32],
    NDArray[np.int64],
]:
    values = codes.values.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.uint16)
    else:
        values = values.to(torch.float32)
    # A negative index becomes a huge one, which the core refuses with the row named.
    indices = codes.indices.cpu().contiguous().numpy().view(np.uint32)
    return values.numpy(), indices, codes.row_offsets.cpu().contiguous().numpy()
