"""config.json: R1's own, transformers' newer form, and what is no R1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.config import R1Config, YarnScaling


def test_defaults_are_r1s() -> None:
    config = R1Config()
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (
        7168,
        61,
        256,
    )
    assert config.qk_head_dim == 192
    assert R1Config.from_dict(config.to_dict()) == config


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
    del raw["rope_theta"]
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
    ],
)
def test_what_is_no_r1(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        R1Config.from_dict({**R1Config().to_dict(), **change})


def test_missing_fields_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden_size, vocab_size missing"):
        R1Config.from_dict({"num_hidden_layers": 2})
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        R1Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        R1Config.from_file(tmp_path / "config.json")
