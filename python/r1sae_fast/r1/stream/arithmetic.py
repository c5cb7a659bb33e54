"""What R1 weighs and works, from its config alone: bytes, parameters, operations a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import BLOCK_SIZE, scale_shape
from r1sae_fast.r1.layout import TensorSpec, block_specs, embedding_specs

IsFp8 = Callable[[TensorSpec], bool]
"""Whether a tensor is stored in fp8; by default all projections are, as in R1."""


def r1_is_fp8(spec: TensorSpec) -> bool:
    """As R1's own checkpoint has it."""
    return spec.quantised


def stored_bytes(specs: Iterable[TensorSpec], is_fp8: IsFp8 = r1_is_fp8) -> int:
    """Bytes on disk: fp8 with float32 scales, else bf16, correction biases float32."""
    return sum(_bytes(spec, is_fp8(spec), 2) for spec in specs)


def kept_bytes(
    specs: Iterable[TensorSpec], fp8: str, itemsize: int, is_fp8: IsFp8 = r1_is_fp8
) -> int:
    """Bytes in the engine: fp8 stays under "w8a8" (but for kv_b_proj), else ``itemsize`` each."""
    return sum(
        _bytes(spec, fp8 == "w8a8" and is_fp8(spec) and not _is_kv_b(spec), itemsize)
        for spec in specs
    )


def dense_bytes(
    specs: Iterable[TensorSpec], fp8: str, itemsize: int, is_fp8: IsFp8 = r1_is_fp8
) -> int:
    """Bytes of the dequantised copies that ``weight_cache="once"`` keeps."""
    if fp8 != "w8a8":
        return 0
    return sum(
        math.prod(spec.shape) * itemsize for spec in specs if is_fp8(spec) and not _is_kv_b(spec)
    )


def dequantize_bytes(specs: Iterable[TensorSpec], itemsize: int, is_fp8: IsFp8 = r1_is_fp8) -> int:
    """While the largest weight is dequantised and packed for its product: an expert's three
    matrices and a packed pair of them, or any other and itself packed."""
    sizes = [
        math.prod(spec.shape) * (2 if spec.expert is None else 5) for spec in specs if is_fp8(spec)
    ]
    return itemsize * max(sizes, default=0)


def _is_kv_b(spec: TensorSpec) -> bool:
    return spec.name.endswith("kv_b_proj.weight")


def _bytes(spec: TensorSpec, fp8: bool, itemsize: int) -> int:
    numbers = math.prod(spec.shape)
    if fp8:
        return numbers + 4 * math.prod(scale_shape(spec.shape, BLOCK_SIZE))
    return numbers * (4 if spec.float32 else itemsize)


@dataclass(frozen=True)
class Work:
    """What one token costs up to a layer.

    Attributes:
        weights: parameters of the products that it enters ("active"), embedding not counted.
        attention: operations on keys and values of the tokens before it, mean over a sequence.
        flops: all, two an entry of a product.
    """

    weights: int
    attention: float
    flops: float


def active_parameters(config: R1Config, index: int) -> int:
    """Of one block: the matrices that a token is multiplied with."""
    width, heads = config.hidden_size, config.num_attention_heads
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = (
        width * config.q_lora_rank
        + config.q_lora_rank * heads * config.qk_head_dim
        + width * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank * expanded
        + heads * config.v_head_dim * width
    )
    if index < config.first_k_dense_replace:
        return attention + 3 * width * config.intermediate_size
    used = config.num_experts_per_tok + config.n_shared_experts
    experts = used * 3 * width * config.moe_intermediate_size
    return attention + experts + width * config.n_routed_experts


def work(config: R1Config, layer: int, context: int) -> Work:
    """Of one token in blocks 0 to ``layer``, in sequences of ``context`` tokens.

    A causal query sees (context + 1) / 2 keys on average; each costs a product of the head's
    query and key width and one of its value width, in every head.
    """
    blocks = layer + 1
    weights = sum(active_parameters(config, index) for index in range(blocks))
    pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = blocks * pair * (context + 1) / 2
    return Work(weights, attention, 2 * weights + attention)


def model_bytes(config: R1Config, layer: int, is_fp8: IsFp8 = r1_is_fp8) -> int:
    """On disk: the embedding and blocks 0 to ``layer``."""
    blocks = sum(stored_bytes(block_specs(config, index), is_fp8) for index in range(layer + 1))
    return stored_bytes(embedding_specs(config), is_fp8) + blocks
