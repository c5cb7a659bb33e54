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
        config_path = self.directory / "config.json"
        if not config_path.is_file():
            raise FileNotFoundError(
                f"{config_path}: no such file; a checkpoint is a folder with config.json, "
                f"{INDEX_NAME} and the shards it names"
            )
        self.config: dict[str, Any] = _read_json(config_path)
        if not isinstance(self.config, dict):
            raise CheckpointError(f"{config_path}: not a JSON object")
        self.block_size = read_quantization(self.config, str(config_path))
        self._open: dict[str, ShardFile] = {}
        index_path = self.directory / INDEX_NAME
        single_path = self.directory / SINGLE_NAME
        if index_path.is_file():
            index = _read_json(index_path)
            shards = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                raise CheckpointError(f"{index_path}: no weight_map of tensor names to shards")
            # A name with a folder in it could lead out of the checkpoint.
            for shard in set(shards.values()):
                if Path(shard).name != shard or shard in ("", ".."):
                    raise CheckpointError(f"{index_path}: {shard!r} is not a plain file name")
            self.shards: dict[str, str] = shards
        elif single_path.is_file():
            self.shards = dict.fromkeys(read_header(single_path), SINGLE_NAME)
        else:
            raise FileNotFoundError(
                f"{self.directory}: neither {INDEX_NAME} nor {SINGLE_NAME}; "
                "the checkpoint is incomplete, fetch it again"
            )

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

    def _shard_of(self, name: str) -> ShardFile:
        """The shard that holds a tensor; raises as :meth:`raw`."""
        shard_name = self.shards.get(name)
        if shard_name is None:
            raise CheckpointError(
                f"{self.directory}: no tensor {name!r} in the index; "
                "the checkpoint is incomplete or of another model"
            )
        shard = self._open.get(shard_name)
        if shard is None:
            shard = self._open[shard_name] = ShardFile(self.directory / shard_name)
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
            scales = self._scales(spec)
            largest = torch.finfo(target.dtype).max
            risky = bool(scales.numel()) and float(scales.abs().max()) * FP8_MAX > largest
            in_place = target.device.type == "cpu" and target.is_contiguous()
            for rows, part in self._parts(spec.name, self._block_size[0]):
                first = rows.start // self._block_size[0]
                grid = scales[first : first + scale_shape(part.shape, self._block_size)[0]]
                out = target[rows] if in_place else None
                restored = dequantize_blocks(part, grid, target.dtype, self._block_size, out)
                if risky and bool(torch.isinf(restored).any()):
                    raise CheckpointError(
                        f"{self.directory}: {spec.name!r} holds weights beyond {largest:.3g}, "
                        f"the largest number of {target.dtype}; load it in float32"
                    )
                if not in_place:
                    target[rows].copy_(restored)
        else:
            for rows, part in self._parts(spec.name):
                target[rows].copy_(part)

    def read_fp8_into(self, spec: TensorSpec, weight: Tensor, scale_inv: Tensor) -> None:
        """Copies one fp8 tensor and its scales as they are; bounded and raising as
        :meth:`read_into`."""
        if not self.is_fp8(spec):
            found = self.entry(spec.name).dtype
            raise CheckpointError(f"{self.directory}: {spec.name!r} is {found}, expected F8_E4M3")
        scale_inv.copy_(self._scales(spec))
        for rows, part in self._parts(spec.name):
            weight[rows].view(torch.uint8).copy_(part.view(torch.uint8))

    @property
    def _block_size(self) -> tuple[int, int]:
        assert self.block_size is not None  # is_fp8 looked
        return self.block_size

    def _scales(self, spec: TensorSpec) -> Tensor:
        scales = self.raw(spec.scale_name).clone()
        self.release(spec.scale_name)
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(
                f"{self.directory / self.shards[spec.scale_name]}: {spec.scale_name!r} holds a "
                "NaN or an infinity; the file is damaged, fetch it again"
            )
        return scales

    def _parts(self, name: str, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Bands of rows (a ``multiple`` each) of a stored tensor, their pages dropped after use."""
        shard = self._shard_of(name)
        stored = shard.tensor(name)
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
