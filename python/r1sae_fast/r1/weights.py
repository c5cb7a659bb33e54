"""Reading single tensors from a checkpoint folder: index, mmap'd shards, named errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.fp8 import FP8_MAX, dequantize_blocks, scale_shape
from r1sae_fast.r1.layout import TensorSpec
from r1sae_fast.r1.shard_file import Entry, ShardFile, read_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PLAIN_DTYPES = ("BF16", "F16", "F32")
_BAND_BYTES = 2**26


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None


def read_quantization(
    config: Mapping[str, Any], where: str = "config.json"
) -> tuple[int, int] | None:
    """Block size of the fp8 weights from a parsed ``config.json``, None without quantisation.

    ``where`` names the config in errors.

    Raises:
        CheckpointError: a quantisation other than R1's block fp8.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{where}: quantization_config is {found!r}, expected a JSON object such as "
            '{"quant_method": "fp8", "weight_block_size": [128, 128]}'
        )
    method, fmt = found.get("quant_method"), found.get("fmt", "e4m3")
    block = found.get("weight_block_size")
    if method != "fp8" or fmt != "e4m3":
        raise CheckpointError(
            f"{where}: quantization_config says {method!r} {fmt!r}, expected 'fp8' 'e4m3' "
            "(DeepSeek's block fp8); convert the checkpoint to that or to bf16"
        )
    if not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise CheckpointError(
            f"{where}: weight_block_size is {block!r}, expected two numbers such as [128, 128]"
        )
    return block[0], block[1]


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``; raises as :class:`CheckpointReader`."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a checkpoint is a folder with {CONFIG_NAME}, "
            f"{INDEX_NAME} and the shards it names"
        )
    config = _read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return config


def read_index(directory: Path) -> dict[str, str]:
    """Each tensor's shard, by the index or by the only shard; raises as
    :class:`CheckpointReader`."""
    index_path, single_path = directory / INDEX_NAME, directory / SINGLE_NAME
    if index_path.is_file():
        index = _read_json(index_path)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{index_path}: no weight_map of tensor names to shards")
        # A name with a folder in it could lead out of the checkpoint.
        for shard in set(shards.values()):
            if Path(shard).name != shard or shard in ("", ".."):
                raise CheckpointError(f"{index_path}: {shard!r} is not a plain file name")
        return shards
    if single_path.is_file():
        return dict.fromkeys(read_header(single_path), SINGLE_NAME)
    raise FileNotFoundError(
        f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME}; "
        "the checkpoint is incomplete, fetch it again"
    )


class CheckpointReader:
    """Reads tensors of a checkpoint folder one by one; shards are mmap'd and opened on first use.

    A context manager. With neither index nor several shards, a single ``model.safetensors``
    serves, as elsewhere.
    """

    def __init__(self, directory: Path | str) -> None:
        """Reads config and index.

        Raises:
            FileNotFoundError: no config.json, or neither index nor model.safetensors.
            CheckpointError: one of them is malformed, or the quantisation is unknown.
        """
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.block_size = read_quantization(self.config, str(self.directory / CONFIG_NAME))
        self.shards = read_index(self.directory)
        self._open: dict[str, ShardFile] = {}

    @classmethod
    def of(
        cls, directory: Path, shards: dict[str, str], block_size: tuple[int, int] | None
    ) -> CheckpointReader:
        """A reader of a folder whose index is known and whose config may be broken."""
        reader = cls.__new__(cls)
        reader.directory, reader.config = directory, {}
        reader.block_size, reader.shards = block_size, shards
        reader._open = {}
        return reader

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards; tensors that :meth:`raw` gave out stay valid."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()

    def shard(self, shard_name: str) -> ShardFile:
        """One file of the checkpoint; raises as :class:`ShardFile`."""
        shard = self._open.get(shard_name)
        if shard is None:
            shard = self._open[shard_name] = ShardFile(self.directory / shard_name)
        return shard

    def _shard_of(self, name: str) -> ShardFile:
        """The shard that holds a tensor; raises as :meth:`raw`."""
        shard_name = self.shards.get(name)
        if shard_name is None:
            raise CheckpointError(
                f"{self.directory}: no tensor {name!r} in the index; "
                "the checkpoint is incomplete or of another model"
            )
        shard = self.shard(shard_name)
        if name not in shard.entries:
            raise CheckpointError(
                f"{shard.path}: the index places {name!r} here, "
                "but the shard lacks it; index and shards are of different checkpoints"
            )
        return shard

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor, by its shard's header; raises as :meth:`raw`."""
        return self._shard_of(name).entries[name]

    def raw(self, name: str) -> Tensor:
        """The stored tensor, mmap'd, in its stored dtype; do not write to it.

        Raises:
            FileNotFoundError: its shard is missing.
            CheckpointError: the index does not name it, or its shard lacks it or is damaged.
        """
        return self._shard_of(name).tensor(name)

    def release(self, name: str) -> None:
        """Drops a tensor's pages from the process's memory."""
        self._shard_of(name).release(name)

    def is_fp8(self, spec: TensorSpec) -> bool:
        """Whether a tensor is stored in fp8; its scales are checked then, by the headers alone.

        Raises:
            FileNotFoundError, CheckpointError: as :meth:`raw` and :meth:`read_into`.
        """
        entry = self.entry(spec.name)
        self._check_shape(spec.name, entry.shape, spec.shape)
        if entry.dtype != "F8_E4M3":
            if entry.dtype not in PLAIN_DTYPES:
                raise CheckpointError(
                    f"{self.directory / self.shards[spec.name]}: {spec.name!r} is {entry.dtype}, "
                    "expected F8_E4M3 with scales, BF16, F16 or F32"
                )
            return False
        if not spec.quantised:
            raise CheckpointError(
                f"{self.directory / self.shards[spec.name]}: {spec.name!r} is fp8, expected BF16, "
                "F16 or F32: in R1's layout only projections are quantised"
            )
        if self.block_size is None:
            raise CheckpointError(
                f"{self.directory}: {spec.name!r} is fp8, "
                "but config.json has no quantization_config that says how it is scaled"
            )
        if spec.scale_name not in self.shards:
            raise CheckpointError(
                f"{self.directory}: {spec.name!r} is fp8, but its scales "
                f"{spec.scale_name!r} are not in the index"
            )
        scales = self.entry(spec.scale_name)
        self._check_shape(spec.scale_name, scales.shape, scale_shape(spec.shape, self.block_size))
        if scales.dtype != "F32":
            raise CheckpointError(
                f"{self.directory / self.shards[spec.scale_name]}: {spec.scale_name!r} is "
                f"{scales.dtype}, expected F32"
            )
        return True

    def read_into(self, spec: TensorSpec, target: Tensor) -> None:
        """Copies one tensor into ``target`` (same shape, floating dtype), dequantised.

        No more than some 64 MiB of the file is in the process's memory at any time.

        Raises:
            FileNotFoundError: its shard is missing.
            CheckpointError: wrong shape or dtype, scales missing, of the wrong shape or not
                finite, or a weight beyond the largest number of ``target``'s dtype.
        """
        if self.is_fp8(spec):
            in_place = target.device.type == "cpu" and target.is_contiguous()
            out = target if in_place else None
            for rows, part in self.dequantized_bands(spec, target.dtype, out):
                if not in_place:
                    target[rows].copy_(part)
        else:
            for rows, part in self.bands(spec.name):
                target[rows].copy_(part)

    def dequantized_bands(
        self, spec: TensorSpec, dtype: torch.dtype, out: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """An fp8 tensor in bands of rows, dequantised (into ``out``, if given, contiguous);
        raising as :meth:`read_into`."""
        if not self.is_fp8(spec) or self.block_size is None:
            raise self._not_fp8(spec)
        height = self.block_size[0]
        scales = self._scales(spec)
        largest = torch.finfo(dtype).max
        risky = bool(scales.numel()) and float(scales.abs().max()) * FP8_MAX > largest
        for rows, part in self.bands(spec.name, height):
            grid = scales[rows.start // height : -(-rows.stop // height)]
            into = None if out is None else out[rows]
            restored = dequantize_blocks(part, grid, dtype, self.block_size, into)
            if risky and bool(torch.isinf(restored).any()):
                raise CheckpointError(
                    f"{self.directory}: {spec.name!r} holds weights beyond {largest:.3g}, "
                    f"the largest number of {dtype}; load it in float32"
                )
            yield rows, restored

    def read_fp8_into(self, spec: TensorSpec, weight: Tensor, scale_inv: Tensor) -> None:
        """Copies one fp8 tensor and its scales as they are; bounded and raising as
        :meth:`read_into`."""
        if not self.is_fp8(spec):
            raise self._not_fp8(spec)
        scale_inv.copy_(self._scales(spec))
        for rows, part in self.bands(spec.name):
            weight[rows].view(torch.uint8).copy_(part.view(torch.uint8))

    def _not_fp8(self, spec: TensorSpec) -> CheckpointError:
        found = self.entry(spec.name).dtype
        return CheckpointError(f"{self.directory}: {spec.name!r} is {found}, expected F8_E4M3")

    def _scales(self, spec: TensorSpec) -> Tensor:
        scales = self.raw(spec.scale_name).clone()
        self.release(spec.scale_name)
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(
                f"{self.directory / self.shards[spec.scale_name]}: {spec.scale_name!r} holds a "
                "NaN or an infinity; the file is damaged, fetch it again"
            )
        return scales

    def bands(self, name: str, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Bands of rows (a ``multiple`` each) of a stored tensor, mmap'd; their pages are dropped
        when the next band is asked for. A single number is a band of one row."""
        shard = self._shard_of(name)
        stored = shard.tensor(name)
        stored = stored.view(1) if stored.ndim == 0 else stored
        if stored.numel() == 0:
            return
        shard.will_need(name)
        row_bytes = stored[0].nbytes
        band = max(_BAND_BYTES // row_bytes // multiple, 1) * multiple
        for start in range(0, stored.shape[0], band):
            rows = slice(start, min(start + band, stored.shape[0]))
            yield rows, stored[rows]
            shard.release(name, rows.start * row_bytes, rows.stop * row_bytes)

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise CheckpointError(
                f"{self.directory / self.shards[name]}: {name!r} has the shape {found}, "
                f"expected {expected} by config.json"
            )
