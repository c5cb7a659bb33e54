"""A small random R1 of four blocks, and SAEs of its width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.r1 import LocalEngine, R1Config, R1Model
from r1sae_fast.r1.config import YarnScaling

HIDDEN = 48
CONFIG: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 128,
    "rope_scaling": YarnScaling(factor=4.0, original_max_position_embeddings=32),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A small model gains nothing from more; other rooms' tests get theirs back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Thinking:
    """A tokenizer with one token a byte below 80; 80 and 81 are <think> and </think>."""

    bos_id, eos_id, think_id, end_think_id = 0, 1, 80, 81

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 80 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(number + 32) for number in ids)

    def apply_chat_template(
        self, messages: Any, *, add_generation_prompt: bool = True
    ) -> list[int]:
        return [0, *self.encode(messages[0]["content"]), 80]


def small_engine(dtype: torch.dtype = torch.float32, **changes: Any) -> LocalEngine:
    """Weights are the same in each dtype, to rounding."""
    generator = torch.Generator().manual_seed(0)
    model = R1Model(R1Config(**{**CONFIG, **changes})).requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.copy_(1 + 0.2 * noise)
    engine = LocalEngine(model.to(dtype), name="small")
    engine.tokenizer = Thinking()  # type: ignore[assignment]  # all that is needed of one
    return engine


@pytest.fixture(scope="session")
def shared_engine() -> LocalEngine:
    """In float32; leave nothing attached."""
    return small_engine()


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    """The same, for tests without hypothesis."""
    return shared_engine


@pytest.fixture(scope="session")
def sae() -> FastSAE:
    """32 features more than dimensions, mode topk, calibrated for mode threshold."""
    torch.manual_seed(0)
    sae = FastSAE(HIDDEN, 80, 6, mode="topk").requires_grad_(False)
    sae.b_enc.normal_(std=0.3)
    sae.b_dec.normal_(std=0.3)
    sae.calibrate_threshold(torch.randn(256, HIDDEN) * 4)
    return sae
