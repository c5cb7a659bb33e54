"""Writes a random checkpoint of R1's layout, about 3 GB by default, to a folder that is given.

    python benches/r1/make_checkpoint.py DIR [--blocks 24]

Block fp8 with scales, ragged kv_a scales, 3 % dense blocks, TinyR1's tokenizer: all that the
reader of R1 itself meets, in a narrower model. Nothing is learned in it; its numbers stay finite.
A few tensors are in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from r1sae_fast.r1.checkpoint import QUANTIZATION
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import FP8_DTYPE, scale_shape
from r1sae_fast.r1.layout import TensorSpec, model_specs
from r1sae_fast.r1.weights import INDEX_NAME
from r1sae_fast.tiny_r1 import vocabulary

SHARD_BYTES = 512 << 20
_RMS = 131.0  # of all finite e4m3 codes, each as likely


def bench_config(blocks: int) -> R1Config:
    """R1's shape at about a quarter of its width, 24 experts of which 4 are chosen."""
    return R1Config(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=4096,
        moe_intermediate_size=768,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        n_routed_experts=24,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=768,
        kv_lora_rank=512,
    )


def random_tensors(spec: TensorSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """A tensor as it is stored, with its scales if it has any."""
    if not spec.quantised:
        dtype = torch.float32 if spec.float32 else torch.bfloat16
        values = torch.randn(spec.shape, generator=generator)
        if len(spec.shape) == 1 and not spec.float32:
            values = 1 + 0.1 * values  # a norm
        elif spec.float32:
            values = 0.01 * values
        return {spec.name: (values * (0.02 if len(spec.shape) == 2 else 1)).to(dtype)}
    codes = torch.randint(0, 254, spec.shape, generator=generator, dtype=torch.uint8)
    codes += codes >= 0x7F  # 0x7f and 0xff are NaN
    grid = torch.rand(scale_shape(spec.shape), generator=generator) + 0.5
    return {
        spec.name: codes.view(FP8_DTYPE),
        spec.scale_name: grid / (_RMS * math.sqrt(spec.shape[1])),
    }


def write(directory: Path, config: R1Config, seed: int = 0) -> int:
    """Writes the checkpoint; returns its bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        save_file(pending, directory / f"{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for spec in model_specs(config):
        pending.update(random_tensors(spec, generator))
        if sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
            total += sum(tensor.nbytes for tensor in pending.values())
            close()
    total += sum(tensor.nbytes for tensor in pending.values())
    close()
    weight_map = {}
    for number, names in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.tmp").replace(directory / name)
        weight_map.update(dict.fromkeys(names, name))
    vocabulary.write(directory)
    text = json.dumps({**config.to_dict(), "quantization_config": QUANTIZATION}, indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=24)
    arguments = parser.parse_args()
    written = write(arguments.directory, bench_config(arguments.blocks))
    print(f"{arguments.directory}: {written / 1e9:.2f} GB")  # noqa: T201  # a script
