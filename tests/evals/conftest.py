"""Small SAEs, shards of known rows and segments, and a small random R1 with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.r1 import LocalEngine, R1Config, R1Model
from r1sae_fast.sae import SaeConfig
from r1sae_fast.shards import ActivationShards, ActivationWriter

HIDDEN = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A small model gains nothing from more; other rooms' tests get theirs back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., ActivationShards]:
    """Writes float32 rows, with their segments, to a new folder of several shards."""
    count = iter(range(1000))

    def write(rows: Tensor, segment: Any = None, *, check_finite: bool = True) -> ActivationShards:
        folder = tmp_path / f"rows-{next(count)}"
        with ActivationWriter(
            folder, rows.shape[1], dtype="float32", rows_per_shard=50, check_finite=check_finite
        ) as writer:
            writer.write(rows, segment=segment)
        return ActivationShards(folder)

    return write


def identity_sae(d_in: int) -> FastSAE:
    """Two features a dimension, one for each sign: what it gives back is x to the bit."""
    directions = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    config = SaeConfig(d_in, 2 * d_in, d_in, "topk", tied=True)
    return FastSAE.from_tensors(config, directions, torch.zeros(2 * d_in), torch.zeros(d_in))


def zero_sae(d_in: int) -> FastSAE:
    """Never fires: what it gives back is 0."""
    sae = FastSAE(d_in, 2 * d_in, 4, mode="topk").requires_grad_(False)
    sae.b_enc.fill_(-1e9)
    return sae


@pytest.fixture
def perfect() -> FastSAE:
    """For the small model."""
    return identity_sae(HIDDEN)


@pytest.fixture
def zero() -> FastSAE:
    """For the small model."""
    return zero_sae(HIDDEN)


@pytest.fixture
def make_identity() -> Callable[[int], FastSAE]:
    """A perfect SAE of any width."""
    return identity_sae


@pytest.fixture
def make_zero() -> Callable[[int], FastSAE]:
    """One that gives zeros."""
    return zero_sae


class Letters:
    """One token a letter; 60 and 61 are <think> and </think>."""

    bos_id, eos_id, think_id, end_think_id = 0, 1, 60, 61

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 58 + 2 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(number + 63) for number in ids)

    def apply_chat_template(
        self, messages: Any, *, add_generation_prompt: bool = True
    ) -> list[int]:
        return [0, *self.encode(messages[0]["content"]), 60]


@pytest.fixture(scope="session")
def engine() -> LocalEngine:
    """A random R1 of three blocks in float32; leave nothing attached."""
    config = R1Config(
        vocab_size=62,
        hidden_size=HIDDEN,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
        rope_scaling=None,
    )
    generator = torch.Generator().manual_seed(0)
    model = R1Model(config).requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scaled = noise * 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(scaled if parameter.ndim > 1 else 1 + 0.2 * noise)
    engine = LocalEngine(model, name="small")
    engine.tokenizer = Letters()  # type: ignore[assignment]  # all that is needed of one
    return engine


@pytest.fixture
def texts() -> list[list[int]]:
    """Of unequal lengths, with prompt, thinking and response, or without; one has no successor."""
    generator = torch.Generator().manual_seed(3)

    def some(count: int) -> list[int]:
        return torch.randint(2, 60, (count,), generator=generator).tolist()

    return [
        [0, *some(4), 60, *some(6), 61, *some(3)],
        [0, *some(9)],
        [5],
        [0, *some(2), 60, *some(9)],
        [0, 7],
    ]
