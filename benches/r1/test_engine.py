"""TinyR1's prefill and generation beside transformers' DeepSeek-V3, the same weights in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor

from r1sae_fast.r1 import LocalEngine

ROWS, TOKENS, NEW = 4, 96, 12


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32, fp8="dequantize")


@pytest.fixture(scope="module")
def twin(engine) -> Any:
    """transformers' model around the engine's weights."""
    transformers = pytest.importorskip("transformers")
    raw = engine.model.config.to_dict()
    for key in ("architectures", "torch_dtype", "model_type", "quantization_config"):
        raw.pop(key, None)
    config = transformers.DeepseekV3Config(**raw)
    twin = transformers.DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    names = {"experts.gate_up": "experts.gate_up_proj", "experts.down": "experts.down_proj"}
    state = {}
    for name, value in engine.model.state_dict().items():
        for ours, theirs in names.items():
            if name.endswith(ours):
                name = name.removesuffix(ours) + theirs
        state[name if name.startswith("lm_head") else f"model.{name}"] = value
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.fixture
def tokens(engine, generator) -> Tensor:
    return torch.randint(3, engine.vocab_size, (ROWS, TOKENS), generator=generator)


@torch.no_grad()
def test_prefill(versus, engine, twin, tokens) -> None:
    last = engine.num_layers - 1
    theirs = twin.model(tokens, use_cache=False).last_hidden_state
    ours = engine.model.norm(engine.residuals(tokens, last))
    assert bool(((ours - theirs).norm(dim=-1) < 1e-3 * theirs.norm(dim=-1)).all())
    versus(
        f"TinyR1 prefill, {ROWS} x {TOKENS} tokens",
        ours=lambda: engine.residuals(tokens, last),
        torch=lambda: twin.model(tokens, use_cache=False),
        work=(tokens.numel(), "tokens"),
    )


@torch.no_grad()
def test_generate(versus, engine, twin, tokens) -> None:
    prompts = tokens.tolist()
    options = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
        "pad_token_id": 0,
    }

    def ours() -> list[list[int]]:
        found = engine.generate(prompts, greedy=True, max_new_tokens=NEW, stop_ids=())
        return [one.tokens for one in found]

    assert all(len(one) in (NEW, TOKENS + NEW) for one in ours())
    versus(
        f"TinyR1 greedy generation, {ROWS} x {NEW} tokens",
        ours=ours,
        torch=lambda: twin.generate(tokens, **options),
        work=(ROWS * NEW, "tokens"),
    )
