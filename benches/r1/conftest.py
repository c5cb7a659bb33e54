"""TinyR1 and transformers' DeepSeek-V3 around the same dequantised weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from r1sae_fast.r1 import LocalEngine

Pair = tuple[LocalEngine, Any]


@pytest.fixture(scope="session")
def tiny_pair() -> Callable[[torch.dtype], Pair]:
    """``tiny_pair(dtype)``: the engine, and transformers' model in its default settings."""
    transformers = pytest.importorskip("transformers")
    made: dict[torch.dtype, Pair] = {}

    def make(dtype: torch.dtype) -> Pair:
        if dtype in made:
            return made[dtype]
        engine = LocalEngine.from_pretrained("tiny-r1", dtype=dtype, fp8="dequantize")
        raw = engine.model.config.to_dict()
        for key in ("architectures", "torch_dtype", "model_type", "quantization_config"):
            raw.pop(key, None)
        twin = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**raw))
        state = {}
        for name, value in engine.model.state_dict().items():
            for ours, theirs in (("experts.gate_up", "_proj"), ("experts.down", "_proj")):
                name = name + theirs if name.endswith(ours) else name
            state[name if name.startswith("lm_head") else f"model.{name}"] = value
        twin = twin.eval().requires_grad_(False).to(dtype)
        for module in twin.modules():
            # Float32 in every dtype of the rest, as in R1.
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        twin.load_state_dict(state, strict=True)
        made[dtype] = engine, twin
        return made[dtype]

    return make
