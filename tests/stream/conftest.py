"""A random checkpoint with more experts than a token's four times, so that they may be streamed
in groups, and ragged sequences for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from r1sae_fast.r1 import R1Config, R1Model, write_checkpoint
from r1sae_fast.r1.config import YarnScaling
from r1sae_fast.tiny_r1 import vocabulary

CONFIG = R1Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=5,
    num_attention_heads=4,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=2,
    q_lora_rank=48,
    kv_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=24,
    max_position_embeddings=160,
    rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A small model gains nothing from more; other rooms' tests get theirs back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in R1's layout, in several shards; do not write into it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    generator = torch.Generator().manual_seed(0)
    model = R1Model(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.copy_(1 + 0.2 * noise)
    write_checkpoint(directory, CONFIG, model.state_dict(), max_shard_bytes=100_000)
    vocabulary.write(directory)
    return directory


@pytest.fixture(scope="session")
def sequences() -> list[list[int]]:
    """Token ids of 23 sequences of 1 to 60 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 61, (23,), generator=generator).tolist()
    return [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]
