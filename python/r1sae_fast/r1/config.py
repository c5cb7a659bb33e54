"""The shape of a DeepSeek-V3/R1 model, read from a checkpoint's ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from r1sae_fast.errors import CheckpointError


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), under DeepSeek's names."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class R1Config:
    """Hyperparameters under the names of R1's ``config.json``; the defaults are R1's own."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 163840
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = field(default_factory=YarnScaling)
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        """Checks that the numbers make a model.

        Raises:
            ValueError: one is not a positive number, or two do not fit each other.
        """
        for name, value in vars(self).items():
            if name in ("norm_topk_prob", "rope_scaling"):
                continue
            least = 0 if name in ("bos_token_id", "eos_token_id", "first_k_dense_replace") else 1
            whole = not isinstance(getattr(R1Config, name), float)
            right = isinstance(value, int) or (isinstance(value, float) and not whole)
            if isinstance(value, bool) or not right or (value < least if whole else value <= 0):
                kind = "a whole number" if whole else "a number"
                bound = f"{least} or more" if whole else "above 0"
                raise ValueError(f"{name} is {value!r}, expected {kind}, {bound}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts is {self.n_routed_experts}, "
                f"expected a multiple of n_group ({self.n_group})"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group is {self.topk_group}, expected at most n_group ({self.n_group})"
            )
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but topk_group "
                f"{self.topk_group} leaves only {reachable} experts to choose from"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}, expected an even number"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> R1Config:
        """Builds a config from the parsed ``config.json``; unknown keys are ignored.

        Raises:
            CheckpointError: another architecture, another router, or a field that is missing.
        """
        model_type = raw.get("model_type")
        if model_type not in ("deepseek_v3", None):
            raise CheckpointError(
                f"config.json: model_type is {model_type!r}, expected 'deepseek_v3' "
                "(DeepSeek-V3, R1 or TinyR1); this engine runs no other architecture"
            )
        for key, expected in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            found = raw.get(key, expected)
            if found != expected:
                raise CheckpointError(f"config.json: {key} is {found!r}, expected {expected!r}")
        own = {f.name for f in fields(cls)}
        values = {key: value for key, value in raw.items() if key in own}
        # transformers 5 writes rope_parameters, with rope_theta in it.
        parameters = raw.get("rope_parameters") or {}
        if "rope_theta" in parameters:
            values.setdefault("rope_theta", parameters["rope_theta"])
        scaling = _scaling(values.pop("rope_scaling", None) or parameters)
        required = {"hidden_size", "num_hidden_layers", "vocab_size"} - values.keys()
        if required:
            raise CheckpointError(f"config.json: {', '.join(sorted(required))} missing")
        try:
            return cls(**values, rope_scaling=scaling)
        except ValueError as error:
            raise CheckpointError(f"config.json: {error}") from None

    @classmethod
    def from_file(cls, path: Path | str) -> R1Config:
        """Reads ``config.json`` at ``path``."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint is a folder with config.json, "
                "model.safetensors.index.json and the shards it names"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from None
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` of this model, with R1's fixed choices spelled out."""
        raw: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.rope_scaling is not None:
            raw["rope_scaling"] = {
                "type": "yarn",
                **{f.name: getattr(self.rope_scaling, f.name) for f in fields(YarnScaling)},
            }
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "attention_bias": False,
            "hidden_act": "silu",
            "moe_layer_freq": 1,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            **raw,
        }


def _scaling(raw: dict[str, Any]) -> YarnScaling | None:
    """YaRN's numbers from ``rope_scaling`` or ``rope_parameters``, None without scaling."""
    kind = raw.get("type", raw.get("rope_type", "yarn" if "factor" in raw else "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise CheckpointError(f"config.json: rope_scaling is {kind!r}, expected 'yarn'")
    known = {f.name for f in fields(YarnScaling)}
    return YarnScaling(**{key: value for key, value in raw.items() if key in known})
