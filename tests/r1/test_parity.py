"""The forward against transformers' DeepseekV3ForCausalLM in float32, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from r1sae_fast.r1.cache import LatentCache
from r1sae_fast.r1.checkpoint import load_model, write_checkpoint
from r1sae_fast.r1.config import R1Config, YarnScaling
from r1sae_fast.r1.engines.local import LocalEngine
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.rope import rotary_table, rotate

MakeModel = Callable[..., R1Model]
Parity = Callable[[str, float], None]

CASES: dict[str, dict[str, Any]] = {
    "small": {},
    "groups_of_four": {
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
    },
    "groups_8_of_which_4": {
        "n_routed_experts": 32,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
    },
    "one_group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "two_shared_experts": {"n_shared_experts": 2, "routed_scaling_factor": 1.0},
    "not_normalised": {"norm_topk_prob": False},
    "wide_values": {"v_head_dim": 40},
    "mscale": {
        "rope_scaling": YarnScaling(
            factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.3
        )
    },
    "r1_head": {
        "num_attention_heads": 2,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_scaling": YarnScaling(),
        "max_position_embeddings": 163840,
    },
}


def transformers_model(model: R1Model) -> DeepseekV3ForCausalLM:
    raw = model.config.to_dict()
    for key in ("architectures", "torch_dtype", "model_type"):
        del raw[key]
    config = DeepseekV3Config(**raw, attn_implementation="eager")
    twin = DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    names = {"experts.gate_up": "experts.gate_up_proj", "experts.down": "experts.down_proj"}
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            if name.endswith(ours):
                name = name.removesuffix(ours) + theirs
        state[name if name.startswith("lm_head") else f"model.{name}"] = value
    twin.load_state_dict(state, strict=True)
    return twin


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest error of any token, relative to the norm of that token's vector."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def residuals(twin: DeepseekV3ForCausalLM, tokens: Tensor, **options: Any) -> list[Tensor]:
    """Output of each block; transformers' hidden_states end with the normalised last one, so
    that one is taken with a hook."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for layer in twin.model.layers
    ]
    twin(tokens, use_cache=False, **options)
    for hook in hooks:
        hook.remove()
    return seen


def worst(model: R1Model, tokens: Tensor, expected: list[Tensor]) -> float:
    """The largest error of any layer's residuals."""
    errors = [relative(model.residual(tokens, i), theirs) for i, theirs in enumerate(expected)]
    return max(errors)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_residual(make_model: MakeModel, parity: Parity, case: str) -> None:
    model = make_model(**CASES[case])
    twin = transformers_model(model)
    # "small" goes beyond yarn's original length of 64.
    tokens = torch.randint(0, 96, (3, 100), generator=torch.Generator().manual_seed(1))
    expected = residuals(twin, tokens)
    assert len(expected) == model.config.num_hidden_layers
    parity("residuals", worst(model, tokens, expected))
    states = twin(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(states[2], expected[1])  # hidden_states[i + 1] is after block i
    parity("logits", relative(model.lm_head(model(tokens)), twin(tokens).logits))


def test_the_correction_bias_and_the_groups_matter(make_model: MakeModel) -> None:
    """The parity above would be hollow if the router's parts changed nothing."""
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(2))
    model = make_model(**CASES["groups_of_four"])
    before = model.residual(tokens)
    other = make_model(**CASES["groups_of_four"])
    for name, buffer in other.named_buffers():
        if name.endswith("correction_bias"):
            buffer.zero_()
    assert relative(other.residual(tokens), before) > 0.01
    ungrouped = make_model(**{**CASES["groups_of_four"], "n_group": 1, "topk_group": 1})
    assert relative(ungrouped.residual(tokens), before) > 0.01


def test_dequantised_checkpoint(make_model: MakeModel, parity: Parity, tmp_path: Any) -> None:
    write_checkpoint(tmp_path, make_model().config, make_model().state_dict())
    model = load_model(tmp_path, dtype=torch.float32, fp8="dequantize")
    tokens = torch.randint(0, 96, (2, 50), generator=torch.Generator().manual_seed(3))
    twin = transformers_model(model)
    parity("residuals", worst(model, tokens, residuals(twin, tokens)))


def test_padding_on_the_right(make_model: MakeModel, parity: Parity) -> None:
    model = make_model()
    twin = transformers_model(model)
    tokens = torch.randint(0, 96, (3, 30), generator=torch.Generator().manual_seed(4))
    lengths = [30, 7, 19]
    mask = torch.tensor([[i < n for i in range(30)] for n in lengths]).long()
    expected = residuals(twin, tokens, attention_mask=mask)
    for row, length in enumerate(lengths):
        theirs = [each[row : row + 1, :length] for each in expected]
        error = max(
            relative(model.residual(tokens, layer)[row : row + 1, :length], each)
            for layer, each in enumerate(theirs)
        )
        parity(f"residuals of {length} tokens padded to 30", error)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("new", [1, 3])
def test_cached_steps(make_model: MakeModel, parity: Parity, case: str, new: int) -> None:
    """Prefill of unequal lengths, then steps on the cache, against one pass over the whole."""
    model = make_model(**CASES[case])
    twin = transformers_model(model)
    total, lengths = 72, torch.tensor([6, 1, 60])
    tokens = torch.randint(0, 96, (3, total), generator=torch.Generator().manual_seed(5))
    cache = LatentCache(
        model.config,
        lengths,
        layers=model.config.num_hidden_layers,
        capacity=60,
        dtype=torch.float32,
    )
    model.residual(tokens[:, :60], cache=cache)
    whole = twin(tokens).logits
    rows = torch.arange(3)[:, None]
    errors = []
    for _ in range(12 // new):
        positions = cache.lengths[:, None] + torch.arange(new)
        step = model.step(tokens[rows, positions], cache)
        errors.append(relative(model.lm_head(model.norm(step)), whole[rows, positions]))
    parity("logits of cached steps", max(errors))
    assert cache.rows.shape[-1] == model.config.kv_lora_rank + model.config.qk_rope_head_dim


def test_bf16_is_as_near_as_transformers_own_bf16(make_model: MakeModel) -> None:
    """Judged by the float32 truth: half-precision rounding, not another model."""
    model = make_model()
    twin = transformers_model(model)
    tokens = torch.randint(0, 96, (4, 40), generator=torch.Generator().manual_seed(6))
    truth = model.residual(tokens, 1)
    theirs = residuals(twin.bfloat16(), tokens)[1].float()
    ours = model.bfloat16().residual(tokens, 1).float()

    def median_error(value: Tensor) -> float:
        return float(((value - truth).norm(dim=-1) / truth.norm(dim=-1)).median())

    assert median_error(ours) < 2 * median_error(theirs)


def test_rotation_for_compilers_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gets real arithmetic, all others a complex product."""
    config = R1Config()
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 30, 5, 64, generator=generator)[..., 1:4, :]
    table = rotary_table(config, torch.arange(4000, 4030)[None])[:, :, None]
    fast = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, table), fast, rtol=1e-6, atol=1e-6)
    assert fast.shape == x.shape
    # A rotation keeps lengths, and position 0 turns nothing.
    pairs = x.view(2, 30, 3, 32, 2).norm(dim=-1)
    torch.testing.assert_close(fast.view(2, 30, 3, 32, 2).norm(dim=-1), pairs)
    origin = rotary_table(config, torch.zeros(1, 1, dtype=torch.int64))
    assert torch.equal(rotate(x, origin), x)


def test_tiny_r1_on_its_own_text(parity: Parity) -> None:
    """The shipped, trained model: logits, every residual, and greedy text step by step."""
    engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32, fp8="dequantize")
    twin = transformers_model(engine.model)
    (generation,) = engine.generate(["What is 12 plus 7 minus 5?"], 40, greedy=True)
    tokens = torch.tensor([generation.tokens])
    parity("residuals", worst(engine.model, tokens, residuals(twin, tokens)))
    logits = twin(tokens).logits
    parity("logits", relative(engine.logits(tokens), logits))
    written = generation.tokens[generation.prompt_length :]
    assert logits[0, generation.prompt_length - 1 : -1].argmax(-1).tolist() == written
