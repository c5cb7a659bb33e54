"""The shape of a DeepSeek-V3/R1 model, read from a checkpoint's ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from r1sae_fast.errors import CheckpointError

# What this engine computes, whatever else a config asks for. Some writers leave them out.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
# The same of rope_scaling: other implementations of YaRN have more choices.
_FIXED_YARN: dict[str, Any] = {"attention_factor": None, "truncate": True}
_TOO_LARGE = 2**63  # for a tensor's size, an infinity among them


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), under DeepSeek's names."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        """Checks that the numbers make a rotation.

        Raises:
            ValueError: one is no number of its range, or the ramp has no width.
        """
        for name, value in vars(self).items():
            whole = name == "original_max_position_embeddings"
            least = {"factor": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}.get(name)
            _check_number(f"rope_scaling.{name}", value, whole, 1 if whole else least)
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"rope_scaling.beta_fast is {self.beta_fast}, "
                f"expected more than beta_slow ({self.beta_slow})"
            )


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
            _check_number(name, value, whole, least if whole else None)
        if not isinstance(self.norm_topk_prob, bool):
            raise ValueError(f"norm_topk_prob is {self.norm_topk_prob!r}, expected true or false")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}, expected more than 1")
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
    def from_dict(cls, raw: Any, where: str = "config.json") -> R1Config:
        """Builds a config from the parsed ``config.json``; ``where`` names it in errors.

        Every field is required, for a default could be another model's. Unknown keys are ignored.

        Raises:
            CheckpointError: another architecture, a choice that this engine does not compute, or
                a field that is missing or of another kind.
        """
        try:
            return cls._from_dict(raw)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None

    @classmethod
    def _from_dict(cls, raw: Any) -> R1Config:
        if not isinstance(raw, dict):
            raise ValueError(f"not a JSON object, found {type(raw).__name__}")
        model_type = raw.get("model_type")
        if model_type not in ("deepseek_v3", None):
            raise ValueError(
                f"model_type is {model_type!r}, expected 'deepseek_v3' "
                "(DeepSeek-V3, R1 or TinyR1); this engine runs no other architecture"
            )
        heads = {"num_key_value_heads": raw.get("num_attention_heads")}
        _require_fixed(raw, {**_FIXED, **heads}, "")
        own = {f.name for f in fields(cls)}
        values = {key: value for key, value in raw.items() if key in own}
        # transformers 5 writes rope_parameters, with rope_theta in it.
        parameters = _object(raw, "rope_parameters")
        if "rope_theta" in parameters:
            values.setdefault("rope_theta", parameters["rope_theta"])
        scaling = _object(raw, "rope_scaling")
        if parameters:
            values.setdefault("rope_scaling", parameters)
        _require(own, values, "")
        return cls(**{**values, "rope_scaling": _scaling(scaling or parameters)})

    @classmethod
    def from_file(cls, path: Path | str) -> R1Config:
        """Reads ``config.json`` at ``path``; raises as :meth:`from_dict`, or FileNotFoundError."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint is a folder with config.json, "
                "model.safetensors.index.json and the shards it names"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from None
        return cls.from_dict(raw, str(path))

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


def _check_number(name: str, value: object, whole: bool, least: float | None) -> None:
    """Refuses what is no number from ``least`` on; without a ``least``, none above 0."""
    allowed: tuple[type, ...] = (int,) if whole else (int, float)
    if type(value) in allowed and isinstance(value, (int, float)):
        above = value > 0 if least is None else value >= least
        if above and value < _TOO_LARGE:  # both are false for a NaN
            return
    kind = "a whole number" if whole else "a number"
    bound = "above 0" if least is None else f"{least:g} or more"
    raise ValueError(f"{name} is {value!r}, expected {kind}, {bound}")


def _require(names: set[str], values: dict[str, Any], prefix: str) -> None:
    missing = [prefix + name for name in sorted(names - values.keys())]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing; R1's config has every one, fetch the file again"
        )


def _require_fixed(values: dict[str, Any], fixed: dict[str, Any], prefix: str) -> None:
    for key, expected in fixed.items():
        found = values.get(key, expected)
        if found != expected:
            raise ValueError(
                f"{prefix}{key} is {found!r}, expected {expected!r}; "
                "this engine computes nothing else"
            )


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The JSON object under ``key``, empty if it is absent or null."""
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} is {found!r}, expected a JSON object or null")
    return found


def _scaling(raw: dict[str, Any]) -> YarnScaling | None:
    """YaRN's numbers from ``rope_scaling`` or ``rope_parameters``, None without scaling."""
    kind = raw.get("type", raw.get("rope_type", "yarn" if "factor" in raw else "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling is {kind!r}, expected 'yarn'")
    known = {f.name for f in fields(YarnScaling)}
    values = {key: value for key, value in raw.items() if key in known}
    _require(known, values, "rope_scaling.")
    _require_fixed(raw, _FIXED_YARN, "rope_scaling.")
    return YarnScaling(**values)
