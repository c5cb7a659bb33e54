"""Single layers of R1's true shape, 7168 wide with 128 heads, on random fp8 weights.

Their weights take about 2 GB in float32 (transformers' layer shares them), and most of the time
goes into making them; so one prefill and a few cached steps serve for all there is to see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RotaryEmbedding,
)

from r1sae_fast.r1.blocks import empty_block, fill_block
from r1sae_fast.r1.cache import NewSlots
from r1sae_fast.r1.checkpoint import QUANTIZATION
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import scale_shape
from r1sae_fast.r1.layout import block_specs
from r1sae_fast.r1.model import Block
from r1sae_fast.r1.moe import MoE
from r1sae_fast.r1.rope import rotary_table
from r1sae_fast.r1.shard_file import DTYPES
from r1sae_fast.r1.weights import CheckpointReader

Parity = Callable[[str, float], None]
TOKENS, STEPS = 9, 3

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("r1_layer")]


def write_block(directory: Path, config: R1Config, index: int) -> None:
    """One block in R1's layout: random codes, scales that make the weights of a trained size."""
    generator = torch.Generator().manual_seed(index)
    tensors: dict[str, tuple[str, tuple[int, ...], float]] = {}
    for spec in block_specs(config, index):
        fan_in = spec.shape[-1]
        if spec.quantised:
            tensors[spec.name] = ("F8_E4M3", spec.shape, 0.0)
            # Random bytes have a root mean square of about 120.
            tensors[spec.scale_name] = ("F32", scale_shape(spec.shape), fan_in**-0.5 / 120)
        else:
            dtype = "F32" if spec.float32 else "BF16"
            tensors[spec.name] = (dtype, spec.shape, 1.0 if "norm" in spec.name else fan_in**-0.5)
    header, at = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for dtype, shape, size in tensors.values():
            if dtype == "F8_E4M3":
                codes = torch.randint(0, 254, shape, generator=generator, dtype=torch.uint8)
                codes[codes == 127] = 0  # NaN; 255 is not drawn
                value = codes
            else:
                spread = torch.rand(shape, generator=generator) - 0.5
                norm = size == 1.0
                value = ((1 + 0.4 * spread) if norm else 3.5 * size * spread).to(DTYPES[dtype])
                if dtype == "F32" and len(shape) == 2:
                    value = (size * (1 + spread)).float()
            file.write(value.view(torch.uint8).numpy().data)
    config_json = {**config.to_dict(), "quantization_config": QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(config_json))


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_layer_of_r1(kind: str, tmp_path: Path, parity: Parity) -> None:
    config = R1Config(
        n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3, num_hidden_layers=4
    )
    index = 0 if kind == "dense" else 3
    write_block(tmp_path, config, index)
    with CheckpointReader(tmp_path) as reader:
        block = empty_block(reader, config, index, dtype=torch.float32, fp8="dequantize")
        fill_block(reader, block, config, index)
    (tmp_path / "model.safetensors").unlink()
    assert isinstance(block.mlp, MoE) == (kind == "mixture")
    x = torch.randn(2, TOKENS, 7168, generator=torch.Generator().manual_seed(9))
    # Positions on both sides of yarn's original length.
    positions = torch.arange(4096 - 4, 4096 - 4 + TOKENS)[None]
    expected = transformers_layer(block, config, index, x, positions)
    rotary = rotary_table(config, positions)
    cache = torch.zeros(2, TOKENS, 576)
    found = block(x, rotary, cache=cache)
    parity("prefill", relative(found, expected))
    first = TOKENS - STEPS
    stepped = torch.zeros(2, TOKENS, 576)
    block(x[:, :first], rotary[:, :first], cache=stepped)
    errors = []
    for place in range(first, TOKENS):
        here = slice(place, place + 1)
        slots = NewSlots(torch.full((2, 1), place), place + 1)
        step = block.step(x[:, here], rotary[:, here], stepped, slots)
        errors.append(relative(step, expected[:, here]))
    parity("cached steps", max(errors))
    torch.testing.assert_close(stepped, cache, rtol=1e-4, atol=1e-4)


def transformers_layer(
    block: Block, config: R1Config, index: int, x: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    raw = config.to_dict()
    for key in ("architectures", "torch_dtype", "model_type"):
        del raw[key]
    theirs = DeepseekV3Config(**raw, attn_implementation="eager")
    with torch.device("meta"):
        layer = DeepseekV3DecoderLayer(theirs, index).eval().requires_grad_(False)
    names = {
        "mlp.experts.gate_up": "mlp.experts.gate_up_proj",
        "mlp.experts.down": "mlp.experts.down_proj",
    }
    state = {names.get(name, name): value for name, value in block.state_dict().items()}
    layer.load_state_dict(state, strict=True, assign=True)
    embeddings = DeepseekV3RotaryEmbedding(theirs)(x, positions)
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        output: torch.Tensor = layer(x, attention_mask=mask, position_embeddings=embeddings)
    return output


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest error of any token, relative to the norm of that token's vector."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
