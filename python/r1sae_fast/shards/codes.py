"""Shards of sparse codes: the few active features of each row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.shards.activations import first_non_finite
from r1sae_fast.shards.columns import IntColumn, empty_columns
from r1sae_fast.shards.folder import ShardFolder
from r1sae_fast.shards.manifest import CODES, Header, plain_json
from r1sae_fast.shards.rows import Rows, as_bytes, count, to_rows
from r1sae_fast.shards.writer import FolderWriter, Growing

DTYPES: dict[str, tuple[torch.dtype, str]] = {
    # name in the manifest: (torch's dtype, safetensors' name)
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
}
_MAX_D_SAE = 2**31 - 1
_U16_FEATURES = 2**16
# At 64 codes a row, about 100 MiB.
_ROWS_PER_SHARD = 1 << 18


class CodeWriter(FolderWriter):
    """Writes sparse codes to a folder of shards.

    Indices are stored in 16 bits up to ``d_sae = 65536``, else in 32. The bytes of the shards
    depend on the rows alone, not on how they were split into calls.

    Args:
        folder: new or empty; or with shards already, if ``resume``.
        d_sae: number of features.
        metadata: JSON values kept in the manifest: which SAE, of which activations ...
        values_dtype: "float32" or "bfloat16" (rounded; codes that become equal are put back in
            the order of their features).
        rows_per_shard: default 262144.
        explicit_shards: shards end where :meth:`finish_shard` is called, and nowhere else.
        resume: go on in a folder of the same d_sae, dtype and (if given) metadata.

    Raises:
        FileExistsError: the folder holds something.
        ShardError: another writer is at work in the folder, or its shards are damaged.
        ValueError: a bad argument, or another header than the folder's when resuming.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        d_sae: int,
        metadata: Mapping[str, Any] | None = None,
        values_dtype: str | torch.dtype = "float32",
        *,
        rows_per_shard: int = _ROWS_PER_SHARD,
        explicit_shards: bool = False,
        resume: bool = False,
    ) -> None:
        if isinstance(d_sae, bool) or not isinstance(d_sae, int):
            raise TypeError(f"d_sae is {d_sae!r}; expected an int")
        if not 1 <= d_sae <= _MAX_D_SAE:
            raise ValueError(f"d_sae is {d_sae}; expected 1 to {_MAX_D_SAE}")
        name = str(values_dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(
                f"values_dtype is {values_dtype!r}; expected one of {', '.join(DTYPES)}"
            )
        self.d_sae = d_sae
        self._dtype, self._stored = DTYPES[name]
        self._short = d_sae <= _U16_FEATURES
        self._values = Growing((), self._dtype)
        self._indices = Growing((), torch.uint16 if self._short else torch.int32)
        self._ends = Growing((), torch.int64)
        self._pending_codes = 0
        super().__init__(
            folder,
            Header(CODES, d_sae, name, plain_json("metadata", dict(metadata or {}))),
            same_metadata=metadata is not None,
            rows_per_shard=rows_per_shard,
            explicit_shards=explicit_shards,
            resume=resume,
        )

    def write(
        self,
        codes: SparseCodes,
        tokens: IntColumn = None,
        sequence_id: IntColumn = None,
        position: IntColumn = None,
        segment: IntColumn = None,
    ) -> None:
        """Appends the rows of ``codes``. All is checked before the first row is accepted.

        Args:
            codes: of this writer's ``d_sae``, any leading shape, on any device.
            tokens: one for each row (in the order of the leading shape, flattened), or one for
                all; left out: unknown. The same goes for the other columns, which are those of
                :meth:`ActivationWriter.write`.

        Raises:
            TypeError: no SparseCodes, or columns that are not integers.
            ValueError: another ``d_sae``, offsets that fall, an index out of range, codes out of
                order, a feature twice in a row, or a column of another length.
            NonFiniteError: a NaN or infinite value; the row is named.
            OSError: a shard became full and could not be written; see :meth:`finish_shard`.
        """
        self._require_open()
        if not isinstance(codes, SparseCodes):
            raise TypeError(f"codes are {type(codes).__name__}; expected SparseCodes")
        if codes.d_sae != self.d_sae:
            raise ValueError(f"codes have d_sae = {codes.d_sae}; this writer's is {self.d_sae}")
        codes = codes.detach().cpu()
        rows = codes.row_offsets.shape[0] - 1
        columns = self._prepare(
            rows,
            {
                "tokens": tokens,
                "sequence_id": sequence_id,
                "position": position,
                "segment": segment,
            },
        )
        _check(codes)
        values, indices = _rounded(codes, self._dtype)
        indices = indices.to(torch.uint16) if self._short else indices
        offsets = codes.row_offsets
        start = 0
        while start < rows:
            part = slice(start, start + self._room(rows - start))
            first, last = int(offsets[part.start]), int(offsets[part.stop])
            pending = self._pending_codes
            self._values.put(pending, values[first:last])
            self._indices.put(pending, indices[first:last])
            ends = offsets[part.start + 1 : part.stop + 1] - first + pending
            self._ends.put(self._pending, ends, self._limit)
            self._put_columns(columns, part)
            self._pending_codes = pending + last - first
            self._pending += part.stop - part.start
            start = part.stop
            self._finish_if_full()

    def _tensors(self, rows: int) -> list[tuple[str, str, list[int], Any]]:
        nnz = int(self._ends.get(rows)[-1]) if rows else 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self._ends.get(rows)])
        return [
            ("values", self._stored, [nnz], as_bytes(self._values.get(nnz))),
            ("indices", "U16" if self._short else "U32", [nnz], as_bytes(self._indices.get(nnz))),
            ("row_offsets", "I64", [rows + 1], as_bytes(offsets)),
        ]

    def _nnz(self) -> int:
        return int(self._ends.get(self._pending)[-1]) if self._pending else 0

    def _reset(self) -> None:
        self._pending_codes = 0
        super()._reset()


@dataclass(frozen=True)
class CodeBatch:
    """Some rows of sparse codes, and where they come from. All on the CPU."""

    codes: SparseCodes
    """Of ``n`` rows."""
    tokens: Tensor
    """``[n]`` int32; -1 unknown."""
    sequence_id: Tensor
    """``[n]`` int64; -1 unknown."""
    position: Tensor
    """``[n]`` int32; -1 unknown."""
    segment: Tensor
    """``[n]`` uint8: PROMPT, THINKING, RESPONSE or UNKNOWN."""

    def __len__(self) -> int:
        return self.tokens.shape[0]


class CodeShards(ShardFolder):
    """A folder of code shards as one long array of sparse rows, in the order of the manifest.

    ``shards[i]``, ``shards[i:j]`` and ``shards[array]`` (integers or booleans) give a
    :class:`CodeBatch`, copied by all cores with the GIL released (indices widen to int32). Offsets
    and indices are checked as they are read; :meth:`verify` checks everything.

    Raises:
        FileNotFoundError: no such folder.
        ShardError: no manifest, or a shard that is missing, truncated, oversized or not what the
            manifest says; the file is named.
    """

    _kind = CODES

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder, DTYPES)
        self.dtype, stored_name = DTYPES[self.stored_dtype]
        """The dtype of the values."""
        self._set = _core.CodeSet(self._listed(), self.d_sae, stored_name)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self._manifest.header.d

    @property
    def nnz(self) -> int:
        """Number of codes in all rows together."""
        return self._set.nnz

    def __getitem__(self, key: Any) -> CodeBatch:
        return self._read(to_rows(key, len(self)))

    def iter_batches(self, rows: int = 4096) -> Iterator[CodeBatch]:
        """All rows in order, ``rows`` at a time (the last batch may have fewer)."""
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows is {rows!r}; expected a positive int")
        for start in range(0, len(self), rows):
            yield self._read((start, min(start + rows, len(self))))

    def _read(self, rows: Rows) -> CodeBatch:
        columns = empty_columns(count(rows))
        arrays = tuple(column.numpy() for column in columns.values())
        offsets = self._set.row_offsets(rows)
        nnz = int(offsets[-1])
        values = torch.empty(nnz, dtype=self.dtype)
        indices = torch.empty(nnz, dtype=torch.int32)
        bits = values if self.dtype == torch.float32 else values.view(torch.uint16)
        self._set.gather(rows, offsets, bits.numpy(), indices.numpy(), arrays)
        codes = SparseCodes(values, indices, torch.from_numpy(offsets), self.d_sae)
        return CodeBatch(codes, **columns)

    def _validate(self, number: int) -> None:
        self._set.validate(number)

    def __reduce__(self) -> tuple[Any, ...]:
        return CodeShards, (self.folder,)


def _check(codes: SparseCodes) -> None:
    """What takes a pass over the data: all that ``SparseCodes.check`` tests, and finiteness."""
    sizes = codes.row_offsets.diff()
    if bool((sizes < 0).any()):
        row = int((sizes < 0).nonzero()[0])
        raise ValueError(f"row_offsets falls after row {row}; expected it to rise or stay")
    if codes.indices.numel() == 0:
        return
    low, high = int(codes.indices.min()), int(codes.indices.max())
    if low < 0 or high >= codes.d_sae:
        raise ValueError(f"indices go from {low} to {high}; expected 0 to {codes.d_sae - 1}")
    at = first_non_finite(codes.values[:, None])
    if at is not None:
        row = int(np.searchsorted(codes.row_offsets.numpy(), at, side="right")) - 1
        raise NonFiniteError(
            f"codes hold a NaN or infinite value in row {row}; find it among the activations "
            "or the weights that were encoded"
        )
    values, indices, offsets = codes.values, codes.indices, codes.row_offsets
    wrong = values[1:] > values[:-1]
    wrong |= (values[1:] == values[:-1]) & (indices[1:] < indices[:-1])
    starts = offsets[(offsets > 0) & (offsets < values.shape[0])]
    wrong[starts - 1] = False  # each row begins anew
    if bool(wrong.any()):
        row = int(np.searchsorted(offsets.numpy(), int(wrong.nonzero()[0]), side="right")) - 1
        raise ValueError(
            f"codes are out of order in row {row}; expected falling values, ties by lower feature"
        )
    repeated = _core.repeated_feature(
        indices.contiguous().numpy(), offsets.contiguous().numpy(), codes.d_sae
    )
    if repeated is not None:
        raise ValueError(f"row {repeated[0]} of codes names feature {repeated[1]} more than once")


def _rounded(codes: SparseCodes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in ``dtype`` and the indices in their order, restored where rounding made ties."""
    values, indices = codes.values.to(dtype), codes.indices
    if values.numel() < 2 or torch.promote_types(codes.values.dtype, dtype) == dtype:
        return values, indices  # each value is one of dtype's: nothing was rounded
    if not bool(values.isfinite().all()):
        largest = float(codes.values.abs().max())
        raise ValueError(f"values reach {largest:g}, more than {dtype} holds; use 'float32'")
    rows = torch.repeat_interleave(codes.row_offsets.diff())
    tied = (values[1:] == values[:-1]) & (rows[1:] == rows[:-1])
    if not bool((tied & (indices[1:] < indices[:-1])).any()):
        return values, indices
    order = torch.argsort(indices, stable=True)
    order = order[torch.argsort(values[order], descending=True, stable=True)]
    order = order[torch.argsort(rows[order], stable=True)]
    return values[order], indices[order]
