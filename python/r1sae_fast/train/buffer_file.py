"""The contents of a mixing buffer, in a file of their own: they change once a filling."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1sae_fast.atomic import replacing
from r1sae_fast.errors import CheckpointError
from r1sae_fast.shards.columns import COLUMNS

__all__ = ["FILES", "path_of", "read", "write"]

FILES = "buffer-*.safetensors"
"""In a run's folder: the buffer's contents after the filling of that number."""

_ST_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def path_of(folder: Path, fillings: int) -> Path:
    """Of the file after so many fillings."""
    return folder / FILES.replace("*", f"{fillings:06d}")


def write(path: Path, tensors: dict[str, Tensor], same: Path | None) -> None:
    """Writes the file whole, unless it is there; ``same`` is one with the same contents."""
    if path.exists():
        return
    if same is not None and same != path and same.name == path.name:
        # Another SAE of a sweep has it already.
        with contextlib.suppress(OSError):
            os.link(same, path)
            return
    header, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _stored_name(name, tensor),
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # By hand: the library would make a second buffer first.
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().data)


def _stored_name(name: str, tensor: Tensor) -> str:
    return (
        "I64"
        if name == "order"
        else COLUMNS[name][1]
        if name in COLUMNS
        else _ST_NAMES[tensor.dtype]
    )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, copied.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: they are written to, and the file goes.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the run's mixing buffer is missing or damaged ({error}); train it anew"
        ) from None
