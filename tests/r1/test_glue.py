"""Rust between the products against the torch code that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast.r1 import glue
from r1sae_fast.r1.attention import LatentAttention
from r1sae_fast.r1.cache import NewSlots
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.moe import Router
from r1sae_fast.r1.norm import RMSNorm
from r1sae_fast.r1.rope import rotary_table, rotate

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_torch(call: Any) -> Any:
    """What training gets: the reference."""
    with torch.enable_grad():
        return call()


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    # In bf16, a difference in float32's last bits may be one rounding step: 2^-8.
    error = 2e-6 if found.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=error, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 63), (3, 123), (2, 5, 256), (0, 8), (40, 1, 7)])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], 1e-6, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * noise(shape[-1], seed=1))
    x = 5 * noise(*shape, seed=2, dtype=dtype)
    assert glue.serves(x, norm.weight)
    close(norm(x), by_torch(lambda: norm(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
def test_rotation_and_latents(dtype: torch.dtype, batched: bool) -> None:
    config = R1Config()
    positions = torch.arange(4000, 4011).expand(3 if batched else 1, -1)
    rotary = rotary_table(config, positions)
    queries = noise(3, 11, 5, 96, seed=3, dtype=dtype)
    expected = torch.cat((queries[..., :32], rotate(queries[..., 32:], rotary[:, :, None])), -1)
    assert glue.rotate_(queries, rotary)
    close(queries, expected)
    norm = RMSNorm(100, 1e-6, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * noise(100, seed=4))
    rows = noise(3, 11, 164, seed=5, dtype=dtype)
    parts = by_torch(lambda: norm(rows[..., :100])), rotate(rows[..., 100:], rotary)
    expected = torch.cat(parts, -1)
    assert glue.latents_(rows, norm.weight, norm.eps, rotary)
    close(rows, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 5, 63]),
    shape=st.sampled_from(
        [(8, 2, 1, 2), (8, 1, 1, 3), (16, 4, 2, 4), (6, 6, 3, 2), (256, 8, 4, 8)]
    ),
    normalise=st.booleans(),
)
def test_routing(seed: int, tokens: int, shape: tuple[int, ...], normalise: bool) -> None:
    experts, groups, kept, chosen = shape
    config = R1Config(
        hidden_size=24,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=chosen,
        norm_topk_prob=normalise,
    )
    router = Router(config).requires_grad_(False)
    router.weight.copy_(noise(experts, 24, seed=seed) / 5)
    router.e_score_correction_bias.copy_(0.1 * noise(experts, seed=seed + 1))
    x = noise(tokens, 24, seed=seed + 2)
    (ids, weights), (other_ids, other_weights) = router(x), by_torch(lambda: router(x))
    assert torch.equal(ids.sort(-1).values, other_ids.sort(-1).values)
    place, other_place = ids.argsort(-1), other_ids.argsort(-1)
    close(weights.gather(-1, place), other_weights.gather(-1, other_place))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("heads", [1, 4, 5])
def test_attention_on_the_cache(
    dtype: torch.dtype, new: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glue, "_ATTENDED", DTYPES)
    monkeypatch.setattr(glue, "_FEW_HEADS", 16)
    config = R1Config(
        hidden_size=64,
        num_attention_heads=heads,
        q_lora_rank=32,
        kv_lora_rank=63,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
    )
    attention = LatentAttention(config, dtype=dtype).requires_grad_(False)
    for parameter in attention.parameters():
        parameter.copy_(noise(*parameter.shape, seed=9) * parameter.shape[-1] ** -0.5)
    x = noise(3, new, 64, seed=10, dtype=dtype)
    positions = torch.tensor([[0], [17], [90]]) + torch.arange(new)
    rotary = rotary_table(config, positions)
    slots = NewSlots(positions, 96)
    before = noise(3, 100, 71, seed=11, dtype=dtype)
    cache, other = before.clone(), before.clone()
    found = attention.step(x, rotary, cache, slots)
    monkeypatch.setattr(glue, "attend", lambda *_: None)
    expected = attention.step(x, rotary, other, slots)
    assert torch.equal(cache, other)
    assert not torch.equal(cache, before)
    error = float((found - expected).norm() / expected.norm())
    assert error < (5e-6 if dtype == torch.float32 else 2**-7)


def test_what_rust_does_not_take() -> None:
    x, weight = noise(4, 8, seed=6), torch.ones(8)
    assert glue.serves(x, weight)
    assert not glue.serves(x.t())
    assert not glue.serves(x.double())
    assert not glue.serves(x, weight.bfloat16())
    assert not glue.serves(x.to("meta"))
    with torch.enable_grad():
        assert not glue.serves(x, weight)
    queries = noise(2, 3, 2, 8, seed=7)
    before = queries.clone()
    # A table that doesn't repeat over the tokens.
    assert not glue.rotate_(queries, rotary_table(R1Config(), torch.arange(4)[None])[..., :2, :])
    assert torch.equal(queries, before)


def test_training_goes_through_torch() -> None:
    norm = RMSNorm(8, 1e-6)
    x = noise(3, 8, seed=8).requires_grad_(True)
    with torch.enable_grad():
        norm(x).square().sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert bool(x.grad.isfinite().all())
