"""The speeds of a machine on a model's own block: short runs of the modules of a real pass.

A product alone says little of what a pass takes: on a CPU half of the time goes to what stands
between the products, and to weights dequantised into memory that no cache holds. So one block,
with room for two of its routed experts, is run on zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from r1sae_fast.r1.blocks import Fp8Mode, empty_block
from r1sae_fast.r1.layout import TensorSpec
from r1sae_fast.r1.model import Block
from r1sae_fast.r1.moe import MoE
from r1sae_fast.r1.rope import rotary_table
from r1sae_fast.r1.stream.arithmetic import active_parameters, dense_bytes
from r1sae_fast.r1.stream.plan import Model, Shape
from r1sae_fast.r1.stream.speeds import Speeds, dequantize_speed, disk_speed, rate_of
from r1sae_fast.r1.weights import CheckpointReader

_ROWS = 2048  # at most, of the probe's micro-batch


@torch.no_grad()
def measure(
    directory: Path,
    reader: CheckpointReader,
    model: Model,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    fp8: Fp8Mode,
) -> Speeds:
    """Takes a few seconds, and the memory of a block with two of its routed experts and a
    micro-batch of at most 2048 rows."""
    config = model.config
    sequences, length = max(shape.batches, key=lambda batch: batch[0] * batch[1])
    length = min(length, _ROWS)
    sequences = max(min(sequences, _ROWS // length), 1)
    rows = sequences * length
    inter = 3 * config.hidden_size * config.moe_intermediate_size
    dequantize = dequantize_speed(
        2 * config.moe_intermediate_size, config.hidden_size, dtype, device
    )

    def net(seconds: float, weights: int) -> float:
        """Without dequantising, which a plan counts by itself."""
        return max(seconds - weights / dequantize, 0.1 * seconds)

    block = empty_block(reader, config, model.layer, dtype=dtype, device=device, fp8=fp8, experts=2)
    for tensor in block.state_dict().values():
        tensor.zero_()
    x = torch.zeros(sequences, length, config.hidden_size, dtype=dtype, device=device)
    rotary = rotary_table(config, torch.arange(length, device=device)[None])
    own = [spec for spec in model.block(model.layer) if spec.expert is None]
    unpacked = dense_bytes(own, fp8, 1, model.is_fp8) if model.dequantises else 0
    seconds = net(1 / rate_of(lambda: _rest(block, x, rotary), device), unpacked)
    pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    active = active_parameters(config, model.layer)
    if model.is_moe(model.layer):
        active -= config.num_experts_per_tok * inter
    flops = rows * (2 * active + pair * (length + 1) / 2) / seconds

    expert_flops, memory = flops, 4e9
    if isinstance(block.mlp, MoE):
        real = shape.largest * config.num_experts_per_tok // config.n_routed_experts
        each = max(min(real, rows), 1)
        one, two = (1 / rate_of(_experts(block, x, each, used), device) for used in (1, 2))
        packed = inter if model.dequantises and model.is_fp8(_an_expert(model)) else 0
        # The second expert's time; where noise hides it, half of both.
        expert = two - one if one < two < 2 * one else two / 2
        expert_flops = 2 * each * inter / net(expert, packed)
        memory = 8 * rows * config.hidden_size / max(one - expert, 0.05 * one)
    return Speeds(
        disk=disk_speed(directory),
        flops=flops,
        expert_flops=expert_flops,
        dequantize=dequantize,
        memory=memory,
    )


def _an_expert(model: Model) -> TensorSpec:
    return next(spec for spec in model.block(model.layer) if spec.expert is not None)


def _rest(block: Block, x: Tensor, rotary: Tensor) -> Tensor:
    """A block without its routed experts; a dense one as it is."""
    x = x + block.self_attn(block.input_layernorm(x), rotary)
    normed = block.post_attention_layernorm(x)
    if isinstance(block.mlp, MoE):
        block.mlp.gate(normed.flatten(0, 1))
        return x + block.mlp.shared_experts(normed)  # type: ignore[no-any-return]  # nn.Module calls are untyped
    return x + block.mlp(normed)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def _experts(block: Block, x: Tensor, each: int, used: int) -> Callable[[], None]:
    """What is done to a micro-batch for a group of experts, ``used`` of which get ``each`` rows."""
    assert isinstance(block.mlp, MoE)
    experts, k = block.mlp.experts, block.mlp.gate.config.num_experts_per_tok
    rows = x.shape[0] * x.shape[1]
    chosen = torch.full((rows, k), 2, device=x.device)  # of another group
    chosen[:each, 0] = 0
    if used == 2:
        chosen[rows - each :, -1] = 1
    weights = torch.ones(rows, k, device=x.device)
    total = torch.zeros(rows, x.shape[2], device=x.device)

    def run() -> None:
        flat = block.post_attention_layernorm(x).flatten(0, 1)
        experts.add_part(total, flat, chosen, weights)

    return run
