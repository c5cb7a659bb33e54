"""The model in the package: R1's layout on disk, and what it promises to do."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from r1sae_fast import tiny_r1
from r1sae_fast.cli.main import app
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.tiny_r1.evaluate import evaluate

runner = CliRunner()


def test_it_is_laid_out_as_r1_is_and_small() -> None:
    folder = tiny_r1.path()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12e6
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "deepseek_v3"
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    places = index["weight_map"]
    attention = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    expected = {
        "model.embed_tokens.weight": ("BF16", [512, 256]),
        attention: ("F8_E4M3", [576, 256]),
        # 576 rows are four blocks and a half: the ragged scale that R1's checkpoint has too.
        f"{attention}_scale_inv": ("F32", [5, 2]),
        "model.layers.0.mlp.gate_proj.weight": ("F8_E4M3", [512, 256]),
        "model.layers.1.mlp.experts.7.down_proj.weight": ("F8_E4M3", [256, 128]),
        "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv": ("F32", [2, 1]),
        "model.layers.1.mlp.gate.e_score_correction_bias": ("F32", [8]),
        "model.layers.1.mlp.gate.weight": ("BF16", [8, 256]),
    }
    for name, (dtype, shape) in expected.items():
        with safe_open(folder / places[name], framework="pt") as file:
            part = file.get_slice(name)
            assert (part.get_dtype(), part.get_shape()) == (dtype, shape), name


def test_it_keeps_its_promises_on_held_out_problems() -> None:
    result = evaluate("tiny-r1", count=280)
    assert result.accuracy >= 0.92
    assert result.well_formed >= 0.96
    assert result.wait_after_wrong >= 0.7
    assert result.wait_after_right <= 0.08
    assert result.wait_auroc > 0.93


def test_solve_shows_the_thinking() -> None:
    result = runner.invoke(app, ["tiny-r1", "solve", "-n", "2", "--family", "clock"])
    assert result.exit_code == 0
    assert result.stdout.count("Okay, so the user has asked what the clock shows.") == 2
    unknown = runner.invoke(app, ["tiny-r1", "solve", "--family", "geometry"])
    assert unknown.exit_code == 1
    assert "no family 'geometry'; there are chain, story" in unknown.stderr


def test_eval_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    result = runner.invoke(app, ["tiny-r1", "eval", "-n", "7", "--json", str(file)])
    assert result.exit_code == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["problems"] == 7
    assert set(figures["by_family"]) == {
        *("chain", "clock", "following", "product", "story", "weekday")
    }
    assert "right final answer" in result.stdout


@pytest.mark.parametrize("extra", [[], ["--seed", "3"]])
def test_train_writes_a_checkpoint_that_runs(tmp_path: Path, extra: list[str]) -> None:
    result = runner.invoke(app, ["tiny-r1", "train", str(tmp_path), "--steps", "1", *extra])
    assert result.exit_code == 0, result.stderr
    engine = LocalEngine.from_pretrained(tmp_path / "checkpoint")
    assert len(engine.generate(["What is 2 times 3 plus 1?"], max_new_tokens=4)[0].tokens) > 8
