"""Small random models of R1's architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from r1sae_fast.r1.config import R1Config, YarnScaling
from r1sae_fast.r1.model import R1Model

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
    "rope_scaling": YarnScaling(factor=4.0, original_max_position_embeddings=64),
}


def small_config(**changes: Any) -> R1Config:
    """A config that runs in milliseconds; unequal widths so that a mixed-up axis shows."""
    return R1Config(**{**SMALL, **changes})


def random_model(config: R1Config, seed: int = 0) -> R1Model:
    """Random float32 weights large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    model = R1Model(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("norm.weight", "layernorm.weight")):
            parameter.copy_(1 + 0.2 * noise)
        elif name.startswith("embed"):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


@pytest.fixture
def make_model() -> Callable[..., R1Model]:
    """``make_model(seed=0, **config changes)``."""

    def make(seed: int = 0, **changes: Any) -> R1Model:
        return random_model(small_config(**changes), seed)

    return make
