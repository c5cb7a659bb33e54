"""Beyond yarn's original length, where R1's rotation is not the plain one any more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RotaryEmbedding,
)

from r1sae_fast.r1.cache import NewSlots
from r1sae_fast.r1.config import R1Config, YarnScaling
from r1sae_fast.r1.model import Block, R1Model
from r1sae_fast.r1.rope import rotary_table

Parity = Callable[[str, float], None]
LENGTH = 4600  # R1's original length is 4096


def test_r1_yarn_beyond_4096_tokens(make_model: Callable[..., R1Model], parity: Parity) -> None:
    """Prefill of more than 4096 tokens, and steps on the cache beyond them."""
    shape = {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "num_attention_heads": 1,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "kv_lora_rank": 512,
        "rope_scaling": YarnScaling(),
        "max_position_embeddings": 163840,
    }
    model = make_model(**shape)
    block = model.layers[0]
    assert isinstance(block, Block)
    x = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(0))
    expected = twin_of(block, model.config, x)
    rotary = rotary_table(model.config, torch.arange(LENGTH)[None])
    cache = torch.zeros(1, LENGTH, 576)
    parity("prefill", relative(block(x, rotary, cache=cache), expected))
    start = LENGTH - 3
    errors = []
    for place in range(start, LENGTH):
        slots = NewSlots(torch.full((1, 1), place), place + 1)
        step = block.step(x[:, place : place + 1], rotary[:, place : place + 1], cache, slots)
        errors.append(relative(step, expected[:, place : place + 1]))
    parity("cached steps", max(errors))
    # The parity above would be hollow if yarn changed nothing there.
    plain = rotary_table(R1Config(rope_scaling=None), torch.arange(LENGTH)[None])
    assert relative(block(x, plain)[:, 4096:], expected[:, 4096:]) > 1e-3


def twin_of(block: Block, config: R1Config, x: torch.Tensor) -> torch.Tensor:
    """What transformers' layer makes of it, with the same weights."""
    raw = config.to_dict()
    for key in ("architectures", "torch_dtype", "model_type"):
        del raw[key]
    theirs = DeepseekV3Config(**raw, attn_implementation="eager")
    with torch.device("meta"):
        layer = DeepseekV3DecoderLayer(theirs, 0).eval().requires_grad_(False)
    state = {
        name.replace("experts.gate_up", "experts.gate_up_proj").replace(
            "experts.down", "experts.down_proj"
        )
        if "shared" not in name
        else name: value
        for name, value in block.state_dict().items()
    }
    layer.load_state_dict(state, strict=True, assign=True)
    length = x.shape[1]
    positions = torch.arange(length)[None]
    embeddings = DeepseekV3RotaryEmbedding(theirs)(x, positions)
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        output: torch.Tensor = layer(x, attention_mask=mask, position_embeddings=embeddings)
    return output


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest error of any token, relative to the norm of that token's vector."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
