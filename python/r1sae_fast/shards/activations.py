"""Shards of activations: one row of ``d_in`` numbers a token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.shards.columns import IntColumn, empty_columns
from r1sae_fast.shards.folder import ShardFolder
from r1sae_fast.shards.loader import ShardLoader
from r1sae_fast.shards.manifest import ACTIVATIONS, Header, plain_json
from r1sae_fast.shards.rows import Rows, as_bytes, count, to_rows
from r1sae_fast.shards.writer import FolderWriter, Growing

DTYPES: dict[str, tuple[torch.dtype, str]] = {
    # name in the manifest: (torch's dtype, safetensors' name)
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
    "float8_e4m3": (torch.float8_e4m3fn, "F8_E4M3"),
}
_FP8 = "float8_e4m3"
_FP8_MAX = 448.0
_SHARD_BYTES = 256 << 20
# Below this, a copy costs less than a mapping of its own and its page faults.
_MAP_BYTES = 256 << 10
# Below this, memory of malloc's is as quick as a pool's.
_POOL_BYTES = 256 << 10
# Buffers that open shards keep for the next batch that is indexed, and how large they may be.
_KEPT, _KEPT_BYTES = 2, 256 << 20


def dtype_name(dtype: str | torch.dtype) -> str:
    """The manifest's name of ``dtype``.

    Raises:
        ValueError: not a dtype that activations are stored in.
    """
    for name, (torch_dtype, _) in DTYPES.items():
        if dtype in (name, torch_dtype, str(torch_dtype).removeprefix("torch.")):
            return name
    raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


class ActivationWriter(FolderWriter):
    """Writes activations to a folder of shards.

    The bytes of the shards depend on the rows alone, not on how they were split into calls.

    Args:
        folder: new or empty; or with shards already, if ``resume``.
        d_in: width of the activations.
        dtype: "bfloat16", "float16", "float32" or "float8_e4m3" (with one float32 scale a row, its
            largest magnitude / 448), or torch's dtype.
        metadata: JSON values kept in the manifest: model, hook point, layer ...
        rows_per_shard: default as many as take about 256 MiB.
        explicit_shards: shards end where :meth:`finish_shard` is called, and nowhere else.
        resume: go on in a folder of the same width, dtype and (if given) metadata. See ``rows``,
            ``shards`` and ``last_extra`` for where the former run came to.
        check_finite: refuse NaN and infinite activations.

    Raises:
        FileExistsError: the folder holds something.
        ShardError: another writer is at work in the folder, or its shards are damaged.
        ValueError: a bad argument, or another header than the folder's when resuming.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        d_in: int,
        dtype: str | torch.dtype = "bfloat16",
        metadata: Mapping[str, Any] | None = None,
        *,
        rows_per_shard: int | None = None,
        explicit_shards: bool = False,
        resume: bool = False,
        check_finite: bool = True,
    ) -> None:
        if isinstance(d_in, bool) or not isinstance(d_in, int):
            raise TypeError(f"d_in is {d_in!r}; expected an int")
        if d_in < 1:
            raise ValueError(f"d_in is {d_in}; expected at least 1")
        name = dtype_name(dtype)
        self.d_in = d_in
        self._dtype, self._stored = DTYPES[name]
        self._check_finite = check_finite
        self._activations = Growing((d_in,), self._dtype)
        self._scales = Growing((), torch.float32)
        if rows_per_shard is None:
            rows_per_shard = max(1, _SHARD_BYTES // (d_in * self._dtype.itemsize))
        super().__init__(
            folder,
            Header(ACTIVATIONS, d_in, name, plain_json("metadata", dict(metadata or {}))),
            same_metadata=metadata is not None,
            rows_per_shard=rows_per_shard,
            explicit_shards=explicit_shards,
            resume=resume,
        )

    def write(
        self,
        activations: Tensor | np.ndarray[Any, Any],
        tokens: IntColumn = None,
        sequence_id: IntColumn = None,
        position: IntColumn = None,
        segment: IntColumn = None,
    ) -> None:
        """Appends rows. All is checked before the first row is accepted.

        Args:
            activations: ``[n, d_in]``, any float dtype, on any device.
            tokens: ``[n]`` token ids, or one for all rows. Left out: unknown (-1).
            sequence_id: ``[n]`` or one for all. Left out: unknown (-1).
            position: ``[n]`` places within the sequence. Left out: unknown (-1).
            segment: ``[n]`` of PROMPT, THINKING, RESPONSE, or one for all. Left out: UNKNOWN.

        Raises:
            TypeError: activations that are not floats, columns that are not integers.
            ValueError: another width or length, or numbers too large for the dtype.
            NonFiniteError: a NaN or infinite activation; the row is named.
            OSError: a shard became full and could not be written; see :meth:`finish_shard`.
        """
        self._require_open()
        given = _to_tensor(activations, self.d_in)
        rows = given.shape[0]
        columns = self._prepare(
            rows,
            {
                "tokens": tokens,
                "sequence_id": sequence_id,
                "position": position,
                "segment": segment,
            },
        )
        stored, scales = self._convert(given)
        start = 0
        while start < rows:
            part = slice(start, start + self._room(rows - start))
            self._activations.put(self._pending, stored[part], self._limit)
            if scales is not None:
                self._scales.put(self._pending, scales[part], self._limit)
            self._put_columns(columns, part)
            self._pending += part.stop - part.start
            start = part.stop
            self._finish_if_full()

    def _convert(self, given: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._check_finite:
            row = first_non_finite(given)
            if row is not None:
                raise NonFiniteError(
                    f"activations hold a NaN or infinite value in row {row} of {given.shape[0]}; "
                    "remove or mask that row, or write with check_finite=False"
                )
        fp8 = self._dtype == torch.float8_e4m3fn
        # fp8 has a scale a row, so what it can hold is a matter of float32.
        held = torch.float32 if fp8 else self._dtype
        limit = torch.finfo(held).max
        narrower = limit < torch.finfo(given.dtype).max
        if self._check_finite and narrower and not _stays_finite(given, held):
            row = first_non_finite(given.to(held)) or 0
            way_out = (
                "write with dtype='bfloat16' or 'float32'"
                if held == torch.float16
                else "scale it down"
            )
            raise ValueError(
                f"activations reach {float(given[row].abs().max()):g} in row {row}, more than "
                f"{held} can hold ({limit:g}); {way_out}"
            )
        # Rounded while they are copied, if need be.
        return quantize_fp8(given.to("cpu", held)) if fp8 else (given, None)

    def _tensors(self, rows: int) -> list[tuple[str, str, list[int], Any]]:
        bytes_ = as_bytes(self._activations.get(rows))
        tensors = [("activations", self._stored, [rows, self.d_in], bytes_)]
        if self._dtype == torch.float8_e4m3fn:
            tensors.append(("scales", "F32", [rows], as_bytes(self._scales.get(rows))))
        return tensors


@dataclass(frozen=True)
class ActivationBatch:
    """Some rows of activations, and where they come from. All on the CPU, and the caller's own."""

    activations: Tensor
    """``[n, d_in]``."""
    tokens: Tensor
    """``[n]`` int32; -1 unknown."""
    sequence_id: Tensor
    """``[n]`` int64; -1 unknown."""
    position: Tensor
    """``[n]`` int32; -1 unknown."""
    segment: Tensor
    """``[n]`` uint8: PROMPT, THINKING, RESPONSE or UNKNOWN."""

    def __len__(self) -> int:
        return self.activations.shape[0]


class ActivationShards(ShardFolder):
    """A folder of activation shards as one long array of rows, in the order of the manifest.

    ``shards[i]``, ``shards[i:j]`` and ``shards[array]`` (integers or booleans) give an
    :class:`ActivationBatch`. A slice within a shard is not copied: its activations are a private
    mapping of the file, so that writing to them copies the pages written to and changes neither
    the file nor any other batch. Everything else is gathered by all cores, the GIL released.

    The files must not be changed while they are open (writers of this package never change a
    listed shard); shards that are listed after opening are not seen.

    Args:
        folder: the folder.
        dtype: what ``activations`` come in; default as stored, bfloat16 if stored in fp8.

    Raises:
        FileNotFoundError: no such folder.
        ShardError: no manifest, or a shard that is missing, truncated, oversized or not what the
            manifest says; the file is named.
    """

    _kind = ACTIVATIONS

    def __init__(
        self, folder: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None
    ) -> None:
        super().__init__(folder, DTYPES)
        self._stored, stored_name = DTYPES[self.stored_dtype]
        self._requested = dtype
        if dtype is not None and dtype_name(dtype) == _FP8:
            raise ValueError("dtype is float8_e4m3; activations are read as bfloat16 or wider")
        natural = "bfloat16" if self.stored_dtype == _FP8 else self.stored_dtype
        self.dtype = DTYPES[natural if dtype is None else dtype_name(dtype)][0]
        """What ``activations`` come in."""
        self._set = _core.ActivationSet(self._listed(), self.d_in, stored_name)
        self._pool = _core.BufferPool(_KEPT, _KEPT_BYTES)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._manifest.header.d

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row of activations."""
        return self.d_in * self._stored.itemsize

    @property
    def is_cold(self) -> bool:
        """Whether rows had to come from the disk lately."""
        return self._set.is_cold

    def will_be_read(self, start: int, stop: int) -> None:
        """Asks the system to fetch rows from the disk, without waiting for them. A hint."""
        start, stop, _ = slice(start, stop).indices(len(self))
        self._set.will_be_read(start, stop)

    def __getitem__(self, key: Any) -> ActivationBatch:
        rows = to_rows(key, len(self))
        size = count(rows) * self.row_bytes
        if isinstance(rows, tuple) and self.dtype == self._stored and size >= _MAP_BYTES:
            mapped = self._set.map_private(*rows)
            if mapped is not None:
                columns = empty_columns(count(rows))
                self._set.columns(rows, tuple(column.numpy() for column in columns.values()))
                activations = torch.from_numpy(mapped).view(self._stored).view(-1, self.d_in)
                return ActivationBatch(activations, **columns)
        return self.gather(rows, self._pool)

    def gather(
        self, rows: Rows, pool: _core.BufferPool, *, pin_memory: bool = False
    ) -> ActivationBatch:
        """Copies or decodes rows that :func:`to_rows` gave into memory of a pool, or page-locked
        memory (torch's, which keeps it for the next batch).
        """
        columns = empty_columns(count(rows))
        arrays = tuple(column.numpy() for column in columns.values())
        read_dtype, output = self._stored, "stored"
        if self.stored_dtype == _FP8:
            # To float16 by way of float32, the others directly.
            narrow = self.dtype == torch.bfloat16
            read_dtype, output = (torch.bfloat16, "BF16") if narrow else (torch.float32, "F32")
        shape = (count(rows), self.d_in)
        as_read = read_dtype == self.dtype
        activations = _empty(shape, read_dtype, pool, pin_memory and as_read)
        self._set.gather(rows, output, as_bytes(activations), arrays)
        if not as_read:
            converted = _empty(shape, self.dtype, pool, pin_memory)
            activations = converted.copy_(activations)
        return ActivationBatch(activations, **columns)

    def loader(
        self,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        *,
        drop_last: bool = False,
        epochs: int | None = 1,
        blocks: tuple[int, int] | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> ShardLoader:
        """Batches of all rows, each row once an epoch; see :class:`ShardLoader`."""
        return ShardLoader(
            self,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            epochs=epochs,
            blocks=blocks,
            prefetch=prefetch,
            pin_memory=pin_memory,
            part=part,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.folder, self._requested)


def _empty(
    shape: tuple[int, int], dtype: torch.dtype, pool: _core.BufferPool, pin_memory: bool
) -> Tensor:
    """Memory for a batch, its contents anything."""
    size = shape[0] * shape[1] * dtype.itemsize
    if pin_memory or size < _POOL_BYTES:
        return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    return torch.from_numpy(pool.take(size)).view(dtype).view(shape)


def _open(folder: str, dtype: str | torch.dtype | None) -> ActivationShards:
    return ActivationShards(folder, dtype=dtype)


def first_non_finite(rows: Tensor) -> int | None:
    """The first row with a NaN or an infinity. One pass that makes no ``[n, d]`` temporary."""
    if rows.numel() == 0:
        return None
    wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
    # A sum is finite only if all its terms are; that it may overflow is settled below.
    suspects = (~rows.sum(dim=-1, dtype=wide).isfinite()).nonzero().flatten()
    for row in suspects.tolist():
        if not bool(rows[row].to(wide).isfinite().all()):
            return int(row)
    return None


def _stays_finite(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite numbers stay finite when rounded. Rounding keeps the order, so the extremes
    tell of all."""
    if rows.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(rows)).to(dtype).isfinite().all())


def quantize_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes ``[n, d]`` and float32 scales ``[n]`` with ``codes * scale`` near ``rows``."""
    wide = rows.to("cpu", torch.float32)
    largest = wide.abs().amax(dim=1) if wide.shape[0] else wide.new_empty(0)
    scales = (largest / _FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (wide / scales[:, None]).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return codes, scales


def _to_tensor(activations: Any, d_in: int) -> Tensor:
    if isinstance(activations, np.ndarray):
        if activations.dtype.kind != "f" or activations.dtype.itemsize > 8:
            raise TypeError(f"activations have dtype {activations.dtype}; expected floats")
        # A read-only, strided or byte-swapped array would not do for torch.
        native = activations.dtype.newbyteorder("=")
        activations = torch.from_numpy(np.array(activations, dtype=native, order="C"))
    if not isinstance(activations, Tensor):
        raise TypeError(
            f"activations are {type(activations).__name__}; expected a torch tensor or numpy array"
        )
    if not activations.dtype.is_floating_point:
        raise TypeError(f"activations have dtype {activations.dtype}; expected floats")
    if activations.device.type == "meta":
        raise ValueError("activations are on the meta device, which holds no numbers")
    if activations.ndim != 2 or activations.shape[1] != d_in:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)}; expected [n, d_in] with "
            f"d_in = {d_in} (flatten leading dimensions with reshape(-1, d_in))"
        )
    rows: Tensor = activations.detach()
    return rows.float() if rows.dtype.itemsize == 1 else rows
