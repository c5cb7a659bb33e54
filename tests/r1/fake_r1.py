"""A checkpoint of R1's true size without its bytes: real headers, sparse files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from r1sae_fast.r1.checkpoint import QUANTIZATION
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import scale_shape
from r1sae_fast.r1.layout import block_specs, model_specs
from r1sae_fast.r1.shard_file import DTYPES
from r1sae_fast.r1.weights import INDEX_NAME

SHARDS = 163


def r1_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor, the multi-token-prediction block 61 among them."""
    config = R1Config()
    width, vocabulary = config.hidden_size, config.vocab_size
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in [*model_specs(config), *block_specs(config, 61)]:
        plain = "F32" if spec.float32 else "BF16"
        tensors[spec.name] = ("F8_E4M3" if spec.quantised else plain, spec.shape)
        if spec.quantised:
            tensors[spec.scale_name] = ("F32", scale_shape(spec.shape))
    prediction = "model.layers.61"
    for name, shape in (
        ("embed_tokens.weight", (vocabulary, width)),
        ("enorm.weight", (width,)),
        ("hnorm.weight", (width,)),
        ("eh_proj.weight", (width, 2 * width)),
        ("shared_head.norm.weight", (width,)),
        ("shared_head.head.weight", (vocabulary, width)),
    ):
        tensors[f"{prediction}.{name}"] = ("BF16", shape)
    return tensors


def r1_config() -> dict[str, Any]:
    """As published, as far as this package reads it."""
    published = {"num_nextn_predict_layers": 1, "quantization_config": QUANTIZATION}
    return {**R1Config().to_dict(), **published}


def write_fake_r1(directory: Path) -> None:
    """163 sparse files and their index; megabytes on the disk, 641 GiB by their sizes."""
    tensors = r1_tensors()
    sizes = {
        name: math.prod(shape) * DTYPES[dtype].itemsize for name, (dtype, shape) in tensors.items()
    }
    limit = sum(sizes.values()) / SHARDS
    shards: list[list[str]] = [[]]
    filled = 0.0
    for name, size in sizes.items():
        if filled + size / 2 > limit * len(shards) and len(shards) < SHARDS:
            shards.append([])
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:06d}.safetensors"
        header, at = {}, 0
        for name in names:
            dtype, shape = tensors[name]
            end = at + sizes[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            weight_map[name] = file
            at = end
        raw = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + at)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(r1_config()))
