"""``r1sae inspect``: by headers alone, R1's true size, and everything that can be wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.r1.inspection import inspect_checkpoint
from r1sae_fast.r1.weights import INDEX_NAME

runner = CliRunner()
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def fake_r1() -> Any:
    """The module beside this one (tests are no package)."""
    spec = importlib.util.spec_from_file_location("fake_r1", Path(__file__).with_name("fake_r1.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_r1"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("r1")
    try:
        fake_r1().write_fake_r1(directory)
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    return directory


def test_r1_of_its_true_size(r1: Path) -> None:
    found = inspect_checkpoint(r1, 37)
    assert found.problems == []
    assert found.shards == 163
    assert round(found.shard_bytes / 2**30, 1) == 641.3
    assert found.quantization == "fp8 e4m3, blocks of 128 x 128"
    assert (found.architecture["num_hidden_layers"], found.architecture["hidden_size"]) == (
        61,
        7168,
    )
    parts = {part.name: part for part in found.parts}
    assert list(parts)[:5] == ["embedding", "block 0", "block 1", "block 2", "block 3"]
    assert list(parts)[-2:] == ["norm and head", "block 61 (multi-token prediction, not used)"]
    assert parts["block 0"].tensors == 4 + 5 * 2 + 3 * 2
    assert parts["block 3"].tensors == 4 + 5 * 2 + 2 + 3 * 2 + 256 * 3 * 2
    assert parts["block 3"].bytes == parts["block 60"].bytes
    assert sum(part.bytes for part in found.parts) < found.shard_bytes
    assert sum(part.bytes for part in found.parts) > 0.9999 * found.shard_bytes
    tap = found.tap
    assert tap is not None
    assert tap.layer == 37
    assert round(tap.bytes / 1e9, 1) == 406.5
    needed = [parts["embedding"], *(parts[f"block {i}"] for i in range(38))]
    assert tap.bytes == sum(part.bytes for part in needed)
    assert tap.tensors == sum(part.tensors for part in needed)
    assert set(tap.shards) == {shard for part in needed for shard in part.shards}
    assert 90 < len(tap.shards) < 110
    assert tap.memory["w8a8"] < tap.memory["bfloat16"] < tap.memory["float32"]


def test_r1_with_a_shard_missing_and_one_cut(r1: Path) -> None:
    shards = sorted(r1.glob("*.safetensors"))
    away = shards[20].rename(r1 / "away")
    cut = shards[100]
    size = cut.stat().st_size
    with cut.open("r+b") as file:
        file.truncate(size - 5)
    try:
        result = runner.invoke(app, ["inspect", str(r1), "--layer", "37", "--json"])
        assert result.exit_code == 1
        problems = json.loads(result.stdout)["problems"]
        assert len(problems) == 2
        assert f"{shards[20].name}: this shard of the checkpoint is missing" in problems[0]
        assert cut.name in problems[1]
        assert "truncated" in problems[1]
        shown = runner.invoke(app, ["inspect", str(r1)])
        assert shown.exit_code == 1
        assert shards[20].name in shown.stdout.replace("\n", "")
    finally:
        away.rename(shards[20])
        with cut.open("r+b") as file:
            file.truncate(size)


def test_tiny_r1_on_the_terminal() -> None:
    result = runner.invoke(app, ["inspect", "tiny-r1", "--layer", "2"])
    assert result.exit_code == 0, result.stderr
    for text in (
        "deepseek_v3",
        "fp8 e4m3, blocks of 128 x 128",
        "blocks 1 to 3, each",
        "8 routed + 1 shared, 2 a token, 1 of 2 groups",
        "A tap after block 2 reads",
        "Nothing is missing or wrong.",
    ):
        assert text in result.stdout, text
    machine = runner.invoke(app, ["inspect", "--json"])
    assert machine.exit_code == 0
    found = json.loads(machine.stdout)
    assert found["tap"]["layer"] == 3
    assert found["problems"] == []


def test_no_such_folder_or_layer(tmp_path: Path) -> None:
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        (["tiny-r1", "--layer", "4"], "layer 4 does not exist: the model has 0 to 3"),
        (["tiny-r1", "--layer", "-1"], "layer -1 does not exist"),
    ):
        result = runner.invoke(app, ["inspect", *arguments])
        assert result.exit_code == 1
        assert message in result.stderr


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def drop_index(directory: Path) -> None:
    (directory / INDEX_NAME).unlink()


SCALE = f"{EXPERT}_scale_inv"
WRONG: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no config": (drop_config, ["config.json: no such file"]),
    "no index": (drop_index, ["neither model.safetensors.index.json nor model.safetensors"]),
    "other architecture": (
        lambda d: edit_config(d, model_type="llama"),
        ["model_type is 'llama', expected 'deepseek_v3'"],
    ),
    "unknown quantisation": (
        lambda d: edit_config(d, quantization_config={"quant_method": "awq"}),
        ["quantization_config says 'awq'"],
    ),
    "index names an absent tensor": (
        lambda d: edit_index(d, lambda m: m.update({"model.extra": next(iter(m.values()))})),
        ["the index places 'model.extra' here, but the shard lacks it"],
    ),
    "index names an absent shard": (
        lambda d: edit_index(d, lambda m: m.update({EXPERT: "gone.safetensors"})),
        ["gone.safetensors: this shard of the checkpoint is missing", "holds 1 tensors"],
    ),
    "tensor missing": (
        lambda d: edit_index(d, lambda m: m.pop(EXPERT) and None),
        [f"no tensor '{EXPERT}' in the index", "holds 1 tensors that the index does not"],
    ),
    "scale missing": (
        lambda d: edit_index(d, lambda m: m.pop(SCALE) and None),
        [f"'{EXPERT}' is fp8, but its scales '{SCALE}' are not in the index"],
    ),
    "scale of another shape": (
        lambda d: edit_tensors(d, lambda t: t.update({SCALE: torch.ones(2, 1)})),
        [f"'{SCALE}' has the shape (2, 1), expected (1, 1)"],
    ),
    "scale of another dtype": (
        lambda d: edit_tensors(d, lambda t: t.update({SCALE: t[SCALE].bfloat16()})),
        [f"'{SCALE}' is BF16, expected F32"],
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": torch.ones(95, 64)})),
        ["'lm_head.weight' has the shape (95, 64), expected (96, 64)"],
    ),
    "wrong dtype": (
        lambda d: edit_tensors(
            d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int32)})
        ),
        ["'model.norm.weight' is I32, expected F8_E4M3 with scales, BF16, F16 or F32"],
    ),
    "fp8 where R1 has none": (
        lambda d: edit_tensors(
            d, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})
        ),
        ["'lm_head.weight' is fp8, expected BF16, F16 or F32"],
    ),
    "two things": (
        lambda d: edit_tensors(
            d,
            lambda t: t.update(
                {"lm_head.weight": torch.ones(95, 64), "model.norm.weight": torch.ones(65)}
            ),
        ),
        ["'lm_head.weight' has the shape", "'model.norm.weight' has the shape"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_everything_wrong_is_named(copy: Path, case: str) -> None:
    assert inspect_checkpoint(copy).problems == []
    spoil, messages = WRONG[case]
    spoil(copy)
    problems = inspect_checkpoint(copy).problems
    for message in messages:
        assert any(message in problem for problem in problems), (message, problems)
    assert len(problems) <= len(messages) + 1
    result = runner.invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 1
    assert messages[0].replace(" ", "") in result.stdout.replace("\n", "").replace(" ", "")


def test_many_problems_are_counted(copy: Path) -> None:
    edit_index(
        copy, lambda m: [m.update({f"x{i}": next(iter(m.values()))}) for i in range(70)] and None
    )
    result = runner.invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 1
    assert "and 20 more; --json lists all" in result.stdout
