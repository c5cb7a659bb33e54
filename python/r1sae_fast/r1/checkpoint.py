"""R1's own checkpoint layout, written and read.

A folder: ``config.json`` (with the quantization_config of block fp8),
``model-0000i-of-0000n.safetensors``, ``model.safetensors.index.json``. The index is written last:
a folder without it is no checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from r1sae_fast.atomic import sync, write_bytes
from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.blocks import Fp8Mode, check_fp8, empty_block, fill_block
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import BLOCK_SIZE, quantize_blocks
from r1sae_fast.r1.fp8_linear import WeightCache
from r1sae_fast.r1.layout import (
    TensorSpec,
    block_specs,
    embedding_specs,
    head_specs,
    model_specs,
)
from r1sae_fast.r1.memory import available_memory
from r1sae_fast.r1.model import Block, R1Model
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


def _write_json(path: Path, value: object) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


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
            sync(path)

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
        _write_json(directory / "config.json", {**config.to_dict(), **quantization})
        sync(directory)
        weight_map = {
            tensor: name for name, tensors in zip(names, members, strict=True) for tensor in tensors
        }
        _write_json(
            directory / INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        sync(directory)
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
    fp8: Fp8Mode = "w8a8",
    weight_cache: WeightCache | Literal["auto"] = "auto",
) -> R1Model:
    """Reads a checkpoint folder into an :class:`R1Model`.

    Every tensor's header is checked before any memory is taken for weights.

    Args:
        directory: the checkpoint.
        dtype: of all parameters that are not fp8; the router's correction bias stays float32.
        device: where the parameters go.
        last_layer: read only the embedding and blocks 0 to this one (no norm, no head): all that
            the residual stream after that block needs.
        fp8: "w8a8" keeps weights that are stored in fp8 so and quantises the activations that
            they meet, as R1 was trained and is served; "dequantize" turns the weights into
            ``dtype`` and leaves activations alone, for parity with tools that do so. No
            difference for a checkpoint without fp8.
        weight_cache: for fp8 weights where the device has no kernels for them, as the CPU:
            "once" dequantises each at its first use and keeps it beside the fp8 one, "call" at
            every call; "auto" is "once" where that takes at most half of the memory left. The
            results are the same to the bit.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard of it is missing.
        CheckpointError: config, index, a shard or a tensor is not as it should be.
        ValueError: no such layer, or an unknown ``fp8`` or ``weight_cache``.
    """
    check_fp8(fp8)
    if weight_cache not in ("auto", *get_args(WeightCache)):
        raise ValueError(f"weight_cache is {weight_cache!r}, expected 'auto', 'once' or 'call'")
    with CheckpointReader(directory) as reader:
        config = R1Config.from_dict(reader.config, str(reader.directory / "config.json"))
        model = R1Model(config, last_layer=last_layer, device="meta", dtype=dtype)
        model.requires_grad_(False).eval()
        rest = [*embedding_specs(config), *(head_specs(config) if model.has_head else ())]
        for spec in rest:
            reader.is_fp8(spec)
        quantised = _quantised_numbers(reader, config, len(model.layers))
        model.fp8 = fp8 if quantised else "none"
        if weight_cache == "auto":
            free = available_memory()
            fits = free is None or 2 * quantised * dtype.itemsize <= free - quantised
            weight_cache = "once" if fits else "call"
        for index in range(len(model.layers)):
            model.layers[index] = empty_block(
                reader,
                config,
                index,
                dtype=dtype,
                device=device,
                fp8=fp8,
                weight_cache=weight_cache,
            )
        model.embed_tokens.to_empty(device=device)
        if model.has_head:
            model.norm.to_empty(device=device)
            model.lm_head.to_empty(device=device)
        state = model.state_dict()
        with torch.no_grad():
            for spec in rest:
                reader.read_into(spec, state[spec.parameter])
        for index, block in enumerate(model.layers):
            assert isinstance(block, Block)
            fill_block(reader, block, config, index)
    return model


def _quantised_numbers(reader: CheckpointReader, config: R1Config, blocks: int) -> int:
    """How many weights of the first ``blocks`` blocks are stored in fp8."""
    return sum(
        math.prod(spec.shape)
        for index in range(blocks)
        for spec in block_specs(config, index)
        if reader.is_fp8(spec)
    )
