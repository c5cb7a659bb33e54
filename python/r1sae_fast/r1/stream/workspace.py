"""Memory that a block needs besides its weights while a micro-batch goes through it.

Counted from the code of :class:`r1sae_fast.r1.model.Block`: the tensors alive at its two widest
moments (attention's output projection, the feed-forward), the worst routing included (every
token to one expert). ``tests/stream/test_workspace.py`` holds it against what torch allocates.
"""

from __future__ import annotations

from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.shapes import size_of


def workspace_bytes(config: R1Config, fp8: str, itemsize: int, tokens: int) -> int:
    """Of a micro-batch of ``tokens`` (padding included), its input and output among them."""
    width = config.hidden_size
    tokens = size_of(tokens)  # an expert's
    widest = max(
        _attention(config, fp8, itemsize),
        _mlp(config, fp8, itemsize, config.intermediate_size)
        if config.first_k_dense_replace
        else 0,
        _moe(config, fp8, itemsize),
    )
    return tokens * (3 * width * itemsize + widest)


def _quantise(fp8: str, itemsize: int, channels: int) -> int:
    """Rounding activations to fp8: a contiguous copy, and the result."""
    return channels * 2 * itemsize if fp8 == "w8a8" else 0


def _attention(config: R1Config, fp8: str, itemsize: int) -> int:
    """A token's, up to the output projection: all heads' queries (as projected, turned and
    joined), latents expanded, keys, values widened, torch's packed copies of the two, outputs
    (twice), and those quantised."""
    qk, value = config.qk_head_dim, config.v_head_dim
    wide = max(qk, value)
    numbers = 2 * qk + config.qk_rope_head_dim + config.qk_nope_head_dim + value
    numbers += qk + wide + (qk + wide) + wide + value
    latents = 2 * (config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim)
    norm = config.hidden_size * (8 + 2 * itemsize)
    heads = config.num_attention_heads * (numbers * itemsize + _quantise(fp8, itemsize, value))
    return norm + latents * itemsize + heads


def _mlp(config: R1Config, fp8: str, itemsize: int, inter: int) -> int:
    width = config.hidden_size
    inside = max(3 * itemsize * inter, itemsize * inter + _quantise(fp8, itemsize, inter))
    before = max(_quantise(fp8, itemsize, width), width * 8)
    return 2 * width * itemsize + before + inside


def _moe(config: R1Config, fp8: str, itemsize: int) -> int:
    width, inter = config.hidden_size, config.moe_intermediate_size
    router = 4 * width + 32 * config.n_routed_experts
    expert = 2 * width * itemsize + 4 * width
    expert += max(5 * itemsize * inter, itemsize * inter + _quantise(fp8, itemsize, inter))
    routed = 4 * width + 2 * width * itemsize
    routed += max(_quantise(fp8, itemsize, width), expert, router)
    shared = width * itemsize + _mlp(config, fp8, itemsize, inter * config.n_shared_experts)
    return width * itemsize + max(routed, shared)
