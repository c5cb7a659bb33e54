"""config.json: R1's own, transformers' newer form, and what is no R1."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.config import R1Config, YarnScaling
from r1sae_fast.tiny_r1.recipe import CONFIG


def test_defaults_are_r1s() -> None:
    config = R1Config()
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (
        7168,
        61,
        256,
    )
    assert config.qk_head_dim == 192
    assert R1Config.from_dict(config.to_dict()) == config


def test_published_and_shipped_config() -> None:
    """R1's own file, and TinyR1's in the package."""
    raw = {**R1Config().to_dict(), "num_nextn_predict_layers": 1, "rope_theta": 10000}
    raw["rope_scaling"] = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    raw.update(ep_size=1, attention_dropout=0.0, initializer_range=0.02, use_cache=True)
    assert R1Config.from_dict(raw) == R1Config()
    shipped = resources.files("r1sae_fast.tiny_r1") / "weights" / "config.json"
    assert R1Config.from_dict(json.loads(shipped.read_text())) == CONFIG


def test_transformers_form(tmp_path: Path) -> None:
    ours = R1Config(rope_theta=5000.0, rope_scaling=YarnScaling(factor=8.0, mscale=0.5))
    raw = ours.to_dict()
    DeepseekV3Config(**raw).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written  # or else this tests nothing
    assert R1Config.from_file(tmp_path / "config.json") == ours


def test_without_yarn() -> None:
    raw = R1Config(rope_scaling=None).to_dict()
    assert R1Config.from_dict(raw).rope_scaling is None
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    del raw["rope_theta"], raw["rope_scaling"]
    config = R1Config.from_dict(raw)
    assert (config.rope_scaling, config.rope_theta) == (None, 7.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'deepseek_v3'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear', expected 'yarn'"),
        ({"hidden_size": "big"}, "hidden_size is 'big', expected a whole number, 1 or more"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"q_lora_rank": None}, "q_lora_rank is None"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0, expected a number, above 0"),
        ({"n_group": 7}, r"expected a multiple of n_group \(7\)"),
        ({"topk_group": 9}, "topk_group is 9, expected at most n_group"),
        ({"num_experts_per_tok": 129}, "leaves only 128 experts"),
        ({"qk_rope_head_dim": 63}, "expected an even number"),
        ({"attention_bias": True}, "attention_bias is True, expected False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2, expected 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, expected 128"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', expected true or false"),
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor is nan"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor is inf"),
        ({"hidden_size": 10**400}, "hidden_size is 1000"),
        ({"rope_theta": 1}, "rope_theta is 1, expected more than 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected a JSON object"),
        ({"rope_scaling": []}, r"rope_scaling is \[\], expected a JSON object"),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected a JSON object"),
    ],
)
def test_what_is_no_r1(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        R1Config.from_dict({**R1Config().to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": "40"}, "rope_scaling.factor is '40', expected a number, 1 or more"),
        ({"factor": 0}, "rope_scaling.factor is 0"),
        ({"factor": True}, "rope_scaling.factor is True"),
        ({"original_max_position_embeddings": -1}, "max_position_embeddings is -1, expected a wh"),
        ({"original_max_position_embeddings": 4096.5}, "max_position_embeddings is 4096.5"),
        ({"beta_fast": None}, "rope_scaling.beta_fast is None"),
        ({"beta_slow": 0}, "rope_scaling.beta_slow is 0, expected a number, above 0"),
        ({"beta_slow": 32}, "beta_fast is 32.0, expected more than beta_slow"),
        ({"mscale": -0.5}, "rope_scaling.mscale is -0.5"),
        ({"mscale_all_dim": math.nan}, "rope_scaling.mscale_all_dim is nan"),
        ({"attention_factor": 2.0}, "rope_scaling.attention_factor is 2.0, expected None"),
        ({"type": ["yarn"]}, r"rope_scaling is \['yarn'\], expected 'yarn'"),
    ],
)
def test_bad_yarn(change: dict[str, Any], message: str) -> None:
    raw = R1Config().to_dict()
    raw["rope_scaling"].update(change)
    with pytest.raises(CheckpointError, match=message):
        R1Config.from_dict(raw)


@pytest.mark.parametrize("name", [field.name for field in fields(R1Config)])
def test_no_field_is_filled_silently(name: str) -> None:
    raw = R1Config().to_dict()
    del raw[name]
    if name == "num_attention_heads":
        del raw["num_key_value_heads"]
    with pytest.raises(CheckpointError, match=f"config.json: {name} missing"):
        R1Config.from_dict(raw)


@pytest.mark.parametrize("name", [field.name for field in fields(YarnScaling)])
def test_no_field_of_yarn_is_filled_silently(name: str) -> None:
    raw = R1Config().to_dict()
    del raw["rope_scaling"][name]
    with pytest.raises(CheckpointError, match=rf"rope_scaling\.{name} missing"):
        R1Config.from_dict(raw)


@pytest.mark.parametrize("raw", [[], 3, "a", None])
def test_no_object(tmp_path: Path, raw: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}.*not a JSON object"):
        R1Config.from_file(tmp_path / "config.json")


def test_missing_fields_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bos_token_id, .*hidden_size, .* missing"):
        R1Config.from_dict({"num_hidden_layers": 2})
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        R1Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        R1Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        R1Config.from_file(tmp_path / "config.json")
