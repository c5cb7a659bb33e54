"""Reading single tensors from a checkpoint folder: index, mmap'd shards, named errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.fp8 import FP8_DTYPE, dequantize_blocks, scale_shape
from r1sae_fast.r1.layout import TensorSpec

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to dtype, shape and data_offsets.

    Checks the file's length against the header and reads nothing else.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: no safetensors file, or shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: {size} bytes hold no safetensors header; "
                    "the file is truncated or of another kind, fetch it again"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: this shard of the checkpoint is missing; fetch it again"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: the header is not valid JSON; the file is damaged or no safetensors file"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: the header is no JSON object but {type(header).__name__}; "
            "the file is damaged or no safetensors file"
        )
    header.pop("__metadata__", None)
    data = max((_data_end(path, name, entry) for name, entry in header.items()), default=0)
    if size != 8 + length + data:
        state = "truncated" if size < 8 + length + data else "longer than it should be"
        raise CheckpointError(
            f"{path}: {size:,} bytes found, its header says {8 + length + data:,}; "
            f"the shard is {state}, fetch it again"
        )
    return header


def _data_end(path: Path, name: str, entry: object) -> int:
    """Where a tensor's bytes end, by its entry of a safetensors header."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(offset) is int and offset >= 0 for offset in offsets)
    ):
        raise CheckpointError(
            f"{path}: the header is no safetensors header: {name!r} has no two data_offsets; "
            "the file is damaged, fetch it again"
        )
    end: int = offsets[1]
    return end


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
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
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
        """Closes the shards."""
        self._open.clear()
        self._stack.close()

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            read_header(path)
            try:
                opened = safe_open(path, framework="pt")
                self._open[name] = self._stack.enter_context(opened)
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a sound safetensors file ({error})") from None
        return self._open[name]

    def raw(self, name: str) -> Tensor:
        """The stored tensor, mmap'd, in its stored dtype.

        Raises:
            FileNotFoundError: its shard is missing.
            CheckpointError: the index does not name it, or its shard lacks it or is damaged.
        """
        shard_name = self.shards.get(name)
        if shard_name is None:
            raise CheckpointError(
                f"{self.directory}: no tensor {name!r} in the index; "
                "the checkpoint is incomplete or of another model"
            )
        shard = self._shard(shard_name)
        if name not in shard.keys():  # noqa: SIM118  # a safetensors handle is no mapping
            raise CheckpointError(
                f"{self.directory / shard_name}: the index places {name!r} here, "
                "but the shard lacks it; index and shards are of different checkpoints"
            )
        tensor: Tensor = shard.get_tensor(name)
        return tensor

    def read_into(self, spec: TensorSpec, target: Tensor) -> None:
        """Copies one tensor into ``target`` (same shape, floating dtype), dequantised.

        Raises:
            CheckpointError: wrong shape or dtype, or scales missing or of the wrong shape.
        """
        stored = self.raw(spec.name)
        self._check(spec.name, stored, spec.shape)
        if stored.dtype == FP8_DTYPE:
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
            scales = self.raw(spec.scale_name)
            self._check(spec.scale_name, scales, scale_shape(spec.shape, self.block_size))
            if scales.dtype != torch.float32:
                raise CheckpointError(
                    f"{self.directory}: {spec.scale_name!r} is {scales.dtype}, expected float32"
                )
            stored = dequantize_blocks(stored, scales, target.dtype, self.block_size)
        elif stored.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{self.directory}: {spec.name!r} is {stored.dtype}, expected float8_e4m3fn with "
                "scales, bfloat16, float16 or float32"
            )
        target.copy_(stored)

    def _check(self, name: str, stored: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(stored.shape) != expected:
            raise CheckpointError(
                f"{self.directory / self.shards[name]}: {name!r} has the shape "
                f"{tuple(stored.shape)}, expected {expected} by config.json"
            )
