"""``r1sae convert``: fp8 to bf16 and back, whole or resumable, loadable by transformers."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM
from typer.testing import CliRunner

from r1sae_fast import tiny_r1
from r1sae_fast.cli.main import app
from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1 import convert as module
from r1sae_fast.r1.checkpoint import load_model, write_checkpoint
from r1sae_fast.r1.convert import convert_checkpoint
from r1sae_fast.r1.engines.local import LocalEngine
from r1sae_fast.r1.fp8 import dequantize_blocks
from r1sae_fast.r1.inspection import inspect_checkpoint
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.weights import INDEX_NAME

MakeModel = Callable[..., R1Model]
runner = CliRunner()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def source(tmp_path: Path, make_model: MakeModel) -> Path:
    """Ragged blocks, several shards, a tokenizer, a multi-token-prediction block."""
    directory = tmp_path / "source"
    model = make_model(kv_lora_rank=128, hidden_size=136, intermediate_size=300)
    write_checkpoint(directory, model.config, model.state_dict(), max_shard_bytes=100_000)
    (directory / "tokenizer.json").write_text("{}")
    shard = "model-extra.safetensors"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(136, 272, generator=generator).to(torch.float8_e4m3fn)
    extra = {
        "model.layers.4.self_attn.q_a_proj.weight": torch.randn(48, 136).to(torch.float8_e4m3fn),
        "model.layers.4.self_attn.q_a_proj.weight_scale_inv": torch.full((1, 2), 0.25),
        "model.layers.4.eh_proj.weight": codes,
        "model.layers.4.eh_proj.weight_scale_inv": torch.rand(2, 3),
        "model.layers.4.enorm.weight": torch.ones(136).bfloat16(),
        "model.layers.4.counter": torch.tensor(7),
    }
    save_file(extra, directory / shard)
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"].update(dict.fromkeys(extra, shard))
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return directory


def test_to_bf16(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "bf16"
    steps: list[tuple[int, int]] = []
    done = convert_checkpoint(source, target, "bf16", progress=lambda *at: steps.append(at))
    assert (done.kept, done.shards) == (0, len(list(source.glob("*.safetensors"))))
    assert steps[-1] == (done.written, done.written)
    assert done.written == sum(path.stat().st_size for path in target.glob("*.safetensors"))
    before, after = tensors(source), tensors(target)
    assert set(after) == {name for name in before if not name.endswith("_scale_inv")}
    for name, value in after.items():
        original = before[name]
        if original.dtype == torch.float8_e4m3fn:
            original = dequantize_blocks(original, before[f"{name}_scale_inv"], torch.bfloat16)
        assert value.dtype == original.dtype, name
        assert torch.equal(value, original), name
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in target.iterdir()) == names  # and no mark is left
    index = json.loads((target / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert inspect_checkpoint(target).problems == []
    dense = load_model(source, fp8="dequantize").state_dict()
    for name, value in load_model(target).state_dict().items():
        assert torch.equal(value, dense[name]), name


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    """The codes come back to the bit, scales within bf16's rounding; then all repeats."""
    names = ("bf16", "fp8", "bf16 again", "fp8 again")
    folders = [source, *(tmp_path / name for name in names)]
    for before, after in itertools.pairwise(folders):
        convert_checkpoint(before, after, "fp8" if after.name.startswith("fp8") else "bf16")
    first, second, third = (tensors(folders[i]) for i in (0, 2, 4))
    unknown = "model.layers.4.eh_proj.weight"  # no name of R1's: it stays bf16
    assert set(second) == set(third) == set(first) - {f"{unknown}_scale_inv"}
    for name, value in second.items():
        if name == unknown:
            continue
        assert value.dtype == first[name].dtype, name
        if name.endswith("_scale_inv") and "layers.4" not in name:
            torch.testing.assert_close(value, first[name], rtol=2**-8, atol=0)
        elif value.dtype == torch.float8_e4m3fn and "layers.4" not in name:
            assert torch.equal(value.view(torch.uint8), first[name].view(torch.uint8)), name
        assert torch.equal(value.float(), third[name].float()), name
    for name, value in tensors(folders[1]).items():
        if "layers.4" in name:
            continue  # random codes, whose blocks' largest is not 448
        torch.testing.assert_close(tensors(folders[3])[name], value, rtol=2**-7, atol=0)
    config = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert config[2] == config[0]


def test_single_file_and_other_dtypes(tmp_path: Path, make_model: MakeModel) -> None:
    """float32 and float16 weights, as other tools write them, in one file without an index."""
    model = make_model()
    directory = tmp_path / "source"
    write_checkpoint(directory, model.config, model.state_dict(), fp8=False)
    (path,) = directory.glob("*.safetensors")
    values = load_file(path)
    values = {n: v.half() if "o_proj" in n else v.float() for n, v in values.items()}
    (directory / INDEX_NAME).unlink()
    path.unlink()
    save_file(values, directory / "model.safetensors")
    convert_checkpoint(directory, tmp_path / "fp8", "fp8")
    found = load_file(tmp_path / "fp8" / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert found[bias].dtype == torch.float32
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert not (tmp_path / "fp8" / INDEX_NAME).exists()
    assert inspect_checkpoint(tmp_path / "fp8").problems == []
    convert_checkpoint(directory, tmp_path / "bf16", "bf16")
    for name, value in load_file(tmp_path / "bf16" / "model.safetensors").items():
        exact = name.endswith("e_score_correction_bias")
        assert value.dtype == (torch.float32 if exact else torch.bfloat16), name


def test_transformers_loads_tiny_r1_in_bf16(tmp_path: Path) -> None:
    result = runner.invoke(app, ["convert", "tiny-r1", str(tmp_path / "out"), "--to", "bf16"])
    assert result.exit_code == 0, result.stderr
    assert "10.7 MiB in 1 shard" in result.stdout.replace("\n", " ")
    twin = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    engine = LocalEngine.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.tensor([engine.encode_prompt("What is 12 plus 7 minus 5?")])
    with torch.no_grad():
        ours, theirs = engine.logits(tokens), twin(tokens).logits
    assert float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()) < 1e-4
    # The weights are those of the fp8 checkpoint, rounded to bf16 and to nothing else.
    original = load_model(tiny_r1.path(), dtype=torch.float32, fp8="dequantize").state_dict()
    for name, value in engine.model.state_dict().items():
        assert torch.equal(value, original[name].bfloat16().float()) or "bias" in name, name
    text = "What is 12 plus 7 minus 5?"
    (ours_text,) = engine.generate([text], 60, greedy=True)
    (fp8_text,) = LocalEngine.from_pretrained(
        "tiny-r1", dtype=torch.float32, fp8="dequantize"
    ).generate([text], 60, greedy=True)
    assert ours_text.text == fp8_text.text


def test_a_failed_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    real = module._put
    calls = []

    def full_disk(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 100:
            raise OSError(28, "No space left on device")
        return real(*arguments)  # type: ignore[arg-type]  # passes through what it was given

    monkeypatch.setattr(module, "_put", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(source, target, "bf16")
    assert not (target / "config.json").exists()
    assert not list(target.glob("*.tmp"))
    finished = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert finished
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(target)
    shard = next(source.glob("*.safetensors"))
    times = shard.stat()
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    with pytest.raises(FileExistsError, match="another conversion was begun here"):
        convert_checkpoint(source, target, "bf16")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = convert_checkpoint(source, target, "bf16")
    assert again.kept == sum((target / name).stat().st_size for name in finished)
    assert all((target / name).stat().st_mtime_ns == at for name, at in finished.items())
    convert_checkpoint(source, tmp_path / "fresh", "bf16")
    assert contents(target) == contents(tmp_path / "fresh")


def test_killed_at_any_moment(source: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from r1sae_fast.r1.convert import convert_checkpoint\n"
        "left = int(sys.argv[3])\n"
        "real = Path.replace\n"
        "def replace(self, target):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return real(self, target)\n"
        "Path.replace = replace\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], 'bf16')\n"
    )
    convert_checkpoint(source, tmp_path / "fresh", "bf16")
    expected = contents(tmp_path / "fresh")
    renames = len(expected) + 1  # each file, and the mark
    running = {
        left: subprocess.Popen(
            [sys.executable, "-c", script, str(source), str(tmp_path / str(left)), str(left)]
        )
        for left in (1, renames // 2, renames - 1)
    }
    for left, process in running.items():
        assert process.wait(timeout=1800) == -9, left
        target = tmp_path / str(left)
        assert not (target / "config.json").exists()
        convert_checkpoint(source, target, "bf16")
        assert contents(target) == expected, left


def test_refusals(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        convert_checkpoint(source, source / ".", "bf16")
    with pytest.raises(ValueError, match="to is 'int4'"):
        convert_checkpoint(source, tmp_path / "a", "int4")  # type: ignore[arg-type]  # the point
    with pytest.raises(CheckpointError, match="is in fp8 already"):
        convert_checkpoint(source, tmp_path / "a", "fp8")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes.txt'"):
        convert_checkpoint(source, tmp_path / "b", "bf16")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["notes.txt"]

    class Full:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Full)
    with pytest.raises(OSError, match=r"still to be written, but the disk has 0\.0 GB left"):
        convert_checkpoint(source, tmp_path / "c", "bf16")
    result = runner.invoke(app, ["convert", str(tmp_path / "nowhere"), "x", "--to", "bf16"])
    assert result.exit_code == 1
    assert "config.json: no such file" in result.stderr


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_numbers_that_have_no_place(tmp_path: Path, make_model: MakeModel, bad: float) -> None:
    model = make_model()
    directory = tmp_path / "source"
    write_checkpoint(directory, model.config, model.state_dict(), fp8=False)
    (path,) = directory.glob("*.safetensors")
    values = {name: value.float() for name, value in load_file(path).items()}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    values[name][2, 3] = bad
    save_file(values, path)
    with pytest.raises(CheckpointError, match=rf"{name}.*can't be converted"):
        convert_checkpoint(directory, tmp_path / "bf16", "bf16")
    assert not list((tmp_path / "bf16").glob("*.safetensors*"))
