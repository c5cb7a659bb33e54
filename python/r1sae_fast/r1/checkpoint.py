"""R1's own checkpoint layout, written and read.

A folder: ``config.json`` (with the quantization_config of block fp8),
``model-0000i-of-0000n.safetensors``, ``model.safetensors.index.json``. The index is written last:
a folder without it is no checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import BLOCK_SIZE, quantize_blocks
from r1sae_fast.r1.layout import TensorSpec, model_specs
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.weights import INDEX_NAME, SINGLE_NAME, CheckpointReader

DEFAULT_SHARD_BYTES = 4 * 2**30
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK_SIZE),
}


def _stored(spec: TensorSpec, state: Mapping[str, Tensor], fp8: bool) -> dict[str, Tensor]:
    """The tensors that hold ``spec`` on disk, by name."""
    if spec.parameter not in state:
        raise CheckpointError(f"the state has no {spec.parameter!r}, which {spec.name!r} is from")
    try:
        value = spec.slice_of(state[spec.parameter].detach())
    except IndexError:
        value = state[spec.parameter]
    if tuple(value.shape) != spec.shape:
        raise CheckpointError(
            f"the state's {spec.parameter!r} has the shape "
            f"{tuple(state[spec.parameter].shape)}; {spec.name!r} is to be {spec.shape}"
        )
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{spec.name!r} holds a NaN or an infinity; nothing was written")
    if spec.quantised and fp8:
        quantised, scales = quantize_blocks(value.cpu())
        return {spec.name: quantised, spec.scale_name: scales}
    dtype = torch.float32 if spec.float32 else torch.bfloat16
    # A copy, since safetensors refuses two tensors that share memory (slices of stacked experts).
    return {spec.name: value.to("cpu", dtype, copy=True).contiguous()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, value: object) -> None:
    """Writes JSON under a temporary name, synced, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def write_checkpoint(
    directory: Path | str,
    config: R1Config,
    state: Mapping[str, Tensor],
    *,
    fp8: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a model in R1's layout: projections in block fp8, the rest in bf16.

    Router weights and biases, norms, embedding and head stay unquantised, as in R1; the
    correction bias is float32. An earlier checkpoint in the folder is replaced once all of the
    new one is on the disk; other files there (the tokenizer) are left alone.

    Args:
        directory: made if need be.
        config: the model's shape.
        state: ``R1Model.state_dict()``.
        fp8: False writes the projections in bf16 as well.
        max_shard_bytes: a shard is closed before it would grow beyond this.

    Raises:
        CheckpointError: the state lacks a tensor, or one has the wrong shape or is not finite.
        OSError: the disk is full or the folder not writable; the earlier checkpoint still stands.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporaries: list[Path] = []
    members: list[list[str]] = []
    total = 0
    try:
        pending: dict[str, Tensor] = {}
        size = 0

        def close_shard() -> None:
            path = directory / f"model-{len(members) + 1:05d}.safetensors.tmp"
            temporaries.append(path)
            members.append(list(pending))
            save_file(pending, path, metadata={"format": "pt"})
            _sync(path)

        for spec in model_specs(config):
            stored = _stored(spec, state, fp8)
            weight = sum(tensor.nbytes for tensor in stored.values())
            if pending and size + weight > max_shard_bytes:
                close_shard()
                pending, size = {}, 0
            pending.update(stored)
            size += weight
            total += weight
        close_shard()

        # From here on only renames. The old index goes first, so that a crash in between leaves
        # a folder that is visibly incomplete, never a mixture of two checkpoints.
        (directory / INDEX_NAME).unlink(missing_ok=True)
        names = [
            f"model-{number:05d}-of-{len(members):05d}.safetensors"
            for number in range(1, len(members) + 1)
        ]
        for old in (*directory.glob("model-*-of-*.safetensors"), directory / SINGLE_NAME):
            if old.name not in names:
                old.unlink(missing_ok=True)
        for temporary, name in zip(temporaries, names, strict=True):
            temporary.replace(directory / name)
        quantization = {"quantization_config": QUANTIZATION} if fp8 else {}
        _write_text(directory / "config.json", {**config.to_dict(), **quantization})
        _sync(directory)
        weight_map = {
            tensor: name for name, tensors in zip(names, members, strict=True) for tensor in tensors
        }
        _write_text(
            directory / INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        _sync(directory)
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def load_model(
    directory: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    last_layer: int | None = None,
) -> R1Model:
    """Reads a checkpoint folder into an :class:`R1Model`, fp8 weights dequantised to ``dtype``.

    Args:
        directory: the checkpoint.
        dtype: of all parameters; the router's correction bias stays float32.
        device: where the parameters go.
        last_layer: read only the embedding and blocks 0 to this one (no norm, no head): all that
            the residual stream after that block needs.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard of it is missing.
        CheckpointError: config, index, a shard or a tensor is not as it should be.
        ValueError: no such layer.
    """
    with CheckpointReader(directory) as reader:
        config = R1Config.from_dict(reader.config, str(reader.directory / "config.json"))
        model = R1Model(config, last_layer=last_layer, device=device, dtype=dtype)
        model.requires_grad_(False).eval()
        state = model.state_dict()
        with torch.no_grad():
            for spec in model_specs(config, last_layer):
                reader.read_into(spec, spec.slice_of(state[spec.parameter]))
    return model
