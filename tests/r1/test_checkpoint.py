"""Checkpoints in R1's layout: round trip, truncated reading, and every way they can be broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1 import checkpoint as checkpoint_module
from r1sae_fast.r1.checkpoint import load_model, write_checkpoint
from r1sae_fast.r1.fp8 import dequantize_blocks
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.weights import INDEX_NAME

MakeModel = Callable[..., R1Model]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture
def written(tmp_path: Path, make_model: MakeModel) -> tuple[Path, R1Model]:
    model = make_model(kv_lora_rank=128, qk_rope_head_dim=8, hidden_size=136)
    write_checkpoint(tmp_path, model.config, model.state_dict(), max_shard_bytes=100_000)
    return tmp_path, model


def stored(directory: Path, name: str) -> torch.Tensor:
    weight_map = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
    return load_file(directory / weight_map[name])[name]


def change(directory: Path, name: str, value: torch.Tensor | None) -> None:
    """Replaces (or removes) a tensor in its shard; the index stays as it is."""
    path = directory / json.loads((directory / INDEX_NAME).read_text())["weight_map"][name]
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path)


def test_layout_is_that_of_r1(written: tuple[Path, R1Model]) -> None:
    directory, model = written
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert config["model_type"] == "deepseek_v3"
    index = json.loads((directory / INDEX_NAME).read_text())
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(shards):05d}.safetensors", s) for s in shards)
    dtypes = {
        EXPERT: torch.float8_e4m3fn,
        f"{EXPERT}_scale_inv": torch.float32,
        KV_A: torch.float8_e4m3fn,
        "model.layers.0.mlp.down_proj.weight": torch.float8_e4m3fn,
        "model.layers.3.mlp.shared_experts.gate_proj.weight": torch.float8_e4m3fn,
        "model.layers.1.mlp.gate.weight": torch.bfloat16,
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.float32,
        "model.layers.1.input_layernorm.weight": torch.bfloat16,
        "model.embed_tokens.weight": torch.bfloat16,
        "model.norm.weight": torch.bfloat16,
        "lm_head.weight": torch.bfloat16,
    }
    for name, dtype in dtypes.items():
        assert stored(directory, name).dtype == dtype, name
    assert stored(directory, f"{KV_A}_scale_inv").shape == (2, 2)  # 136 x 136: ragged both ways
    total = sum(t.nbytes for s in shards for t in load_file(directory / s).values())
    assert index["metadata"]["total_size"] == total
    assert not list(directory.glob("*.tmp"))
    up = dequantize_blocks(stored(directory, EXPERT), stored(directory, f"{EXPERT}_scale_inv"))
    inter = model.config.moe_intermediate_size
    expected = model.state_dict()["layers.1.mlp.experts.gate_up"][3, inter:]
    assert (up - expected).abs().max() < 0.04 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(written: tuple[Path, R1Model], dtype: torch.dtype) -> None:
    directory, model = written
    loaded = load_model(directory, dtype=dtype, fp8="dequantize")
    assert loaded.config == model.config
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        wanted = torch.float32 if name.endswith("correction_bias") else dtype
        assert state[name].dtype == wanted
        difference = (state[name].float() - value).abs().max()
        assert difference <= 0.04 * value.abs().max(), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # What is written again from dequantised float32 weights is the same to the bit.
    if dtype == torch.float32:
        again = directory / "again"
        write_checkpoint(again, loaded.config, state)
        for name, value in load_model(again, dtype=dtype, fp8="dequantize").state_dict().items():
            assert torch.equal(value, state[name]), name


def test_without_fp8(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model()
    write_checkpoint(tmp_path, model.config, model.state_dict(), fp8=False)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    for name, value in load_model(tmp_path, dtype=torch.float32).state_dict().items():
        wanted = value if name.endswith("correction_bias") else value.bfloat16().float()
        assert torch.equal(value, wanted), name


def test_last_layer_needs_only_the_shards_below(written: tuple[Path, R1Model]) -> None:
    directory, _ = written
    weight_map = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
    needed = {
        shard
        for name, shard in weight_map.items()
        if name.startswith(("model.embed", "model.layers.0.", "model.layers.1."))
    }
    assert len(needed) < len(set(weight_map.values()))
    for shard in set(weight_map.values()) - needed:
        (directory / shard).unlink()
    truncated = load_model(directory, dtype=torch.float32, last_layer=1)
    assert len(truncated.layers) == 2
    assert not hasattr(truncated, "lm_head")
    with pytest.raises(FileNotFoundError, match=r"model-\d+-of-\d+\.safetensors.*missing"):
        load_model(directory, dtype=torch.float32)


@pytest.mark.parametrize("layer", [-1, 4, 61])
def test_bad_last_layer(written: tuple[Path, R1Model], layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} .*0 to 3"):
        load_model(written[0], last_layer=layer)


def test_replaces_an_earlier_checkpoint_and_keeps_other_files(
    written: tuple[Path, R1Model], make_model: MakeModel
) -> None:
    directory, _ = written
    (directory / "tokenizer.json").write_text("{}")
    other = make_model(seed=5)
    write_checkpoint(directory, other.config, other.state_dict(), fp8=False)
    assert (directory / "tokenizer.json").read_text() == "{}"
    assert [p.name for p in directory.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert load_model(directory).config == other.config


def test_failed_write_leaves_the_earlier_checkpoint(
    written: tuple[Path, R1Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = written
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    real, calls = checkpoint_module.save_file, []

    def full_disk(*args: object, **options: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*args, **options)  # type: ignore[arg-type]  # passes through what it was given

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(directory, model.config, model.state_dict(), max_shard_bytes=50_000)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_killed_writer_never_leaves_a_mixture(written: tuple[Path, R1Model]) -> None:
    """A process that dies among its renames leaves a folder that is refused, then repaired."""
    directory, model = written
    old = load_model(directory, dtype=torch.float32, fp8="dequantize").state_dict()
    doubled = {name: value * 2 for name, value in model.state_dict().items()}
    script = directory / "kill.py"
    torch.save({"state": doubled}, directory / "state.pt")
    script.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from r1sae_fast.r1.checkpoint import write_checkpoint\n"
        "from r1sae_fast.r1.config import R1Config\n"
        "directory, left = Path(sys.argv[1]), int(sys.argv[2])\n"
        "config = R1Config.from_file(directory / 'config.json')\n"
        "real = Path.replace\n"
        "def replace(self, target):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0:\n"
        "        os._exit(9)\n"
        "    return real(self, target)\n"
        "Path.replace = replace\n"
        "state = torch.load(directory / 'state.pt', weights_only=True)['state']\n"
        "write_checkpoint(directory, config, state, max_shard_bytes=100_000)\n"
    )
    # Two of the new shards are in place, the others still hold the old weights.
    subprocess.run([sys.executable, str(script), str(directory), "2"], check=False, timeout=1800)
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load_model(directory)
    write_checkpoint(directory, model.config, doubled, max_shard_bytes=100_000)
    assert not list(directory.glob("*.safetensors.tmp"))
    # Doubling only moves the exponents, so the new checkpoint is exactly twice the old one.
    for name, value in (
        load_model(directory, dtype=torch.float32, fp8="dequantize").state_dict().items()
    ):
        assert torch.equal(value, old[name] * 2), name


def test_state_of_another_shape_or_not_finite(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model()
    state = model.state_dict()
    with pytest.raises(CheckpointError, match=r"no 'norm\.weight'"):
        write_checkpoint(
            tmp_path / "a", model.config, {k: v for k, v in state.items() if k != "norm.weight"}
        )
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj"):
        write_checkpoint(
            tmp_path / "b",
            model.config,
            {**state, "layers.2.mlp.experts.gate_up": torch.zeros(8, 64, 63)},
        )
    bad = {**state, "lm_head.weight": torch.full((96, 64), torch.nan)}
    with pytest.raises(CheckpointError, match=r"lm_head.*NaN"):
        write_checkpoint(tmp_path / "c", model.config, bad)
    assert not list((tmp_path / "c").iterdir())


def test_missing_folder_config_or_index(written: tuple[Path, R1Model], tmp_path: Path) -> None:
    directory, _ = written
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path / "nowhere")
    (directory / INDEX_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json"):
        load_model(directory)
    (directory / "config.json").write_text("{ half")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(directory)


def test_shard_missing_truncated_oversized_or_foreign(written: tuple[Path, R1Model]) -> None:
    directory, _ = written
    shard = sorted(directory.glob("*.safetensors"))[1]
    good = shard.read_bytes()
    for bad, message in (
        (good[:-7], r"found, its header says .* truncated"),
        (good + b"tail", "longer than it should be"),
        (good[:100], "truncated or of another kind"),
        (b"", "truncated or of another kind"),
        (b"\x10" + bytes(7) + b"not json at all!", "not valid JSON"),
        (b"\x10" + bytes(7) + b'{"a": {"x": 1} }', "no safetensors header: 'a'"),
        (b"\x02" + bytes(7) + b"[]", "no JSON object but list"),
        (b"\x01" + bytes(7) + b"3", "no JSON object but int"),
        (b"\x03" + bytes(7) + b'"a"', "no JSON object but str"),
        *(
            (len(header).to_bytes(8, "little") + header, message)
            for header, message in (
                (b"[" * 200_000, "not valid JSON"),
                (b'{"a": []}', "no safetensors header: 'a'"),
                (b'{"a": {"data_offsets": [0, 1e999]}}', "no safetensors header: 'a'"),
                (b'{"a": {"data_offsets": [0, "4"]}}', "no safetensors header: 'a'"),
                (b'{"a": {"data_offsets": [0, -4]}}', "no safetensors header: 'a'"),
            )
        ),
    ):
        shard.write_bytes(bad)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(directory)
        assert shard.name in str(caught.value)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(directory)


def test_wrong_tensors_are_named(written: tuple[Path, R1Model]) -> None:
    directory, _ = written
    fp8, scales = stored(directory, EXPERT), stored(directory, f"{EXPERT}_scale_inv")
    for name, value, message in (
        (EXPERT, None, "shard lacks it"),
        (EXPERT, fp8[:-1].contiguous(), r"has the shape .* expected \(32, 136\)"),
        (EXPERT, torch.zeros(fp8.shape, dtype=torch.int8), "I8, expected F8_E4M3"),
        (f"{EXPERT}_scale_inv", scales[:, :1].contiguous(), r"shape \(1, 1\), expected \(1, 2\)"),
        (f"{EXPERT}_scale_inv", scales.bfloat16(), "BF16, expected F32"),
        (f"{EXPERT}_scale_inv", scales * torch.nan, "holds a NaN or an infinity"),
        (f"{EXPERT}_scale_inv", scales / 0, "holds a NaN or an infinity"),
        ("lm_head.weight", torch.zeros(96, 136).to(fp8.dtype), "is fp8, expected BF16"),
        ("model.norm.weight", torch.zeros(136, dtype=torch.int64), "I64, expected F8_E4M3"),
    ):
        original = stored(directory, name)
        change(directory, name, value)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(directory)
        assert name in str(caught.value)
        path = directory / json.loads((directory / INDEX_NAME).read_text())["weight_map"][name]
        save_file({**load_file(path), name: original}, path)
    load_model(directory)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(400.0, torch.float16), (3.399e38 / 448, torch.bfloat16)]
)
def test_weights_beyond_the_dtypes_largest_number(
    written: tuple[Path, R1Model], scale: float, dtype: torch.dtype
) -> None:
    """Finite as stored, infinite in the dtype asked for: refused, not loaded."""
    directory, _ = written
    scales = stored(directory, f"{EXPERT}_scale_inv")
    change(directory, f"{EXPERT}_scale_inv", torch.full_like(scales, scale))
    with pytest.raises(CheckpointError, match=rf"{EXPERT}.*beyond .*largest number of {dtype}"):
        load_model(directory, dtype=dtype, fp8="dequantize")
    load_model(directory, dtype=torch.float32, fp8="dequantize")


def test_index_without_a_tensor_or_its_scale(written: tuple[Path, R1Model]) -> None:
    directory, _ = written
    index = json.loads((directory / INDEX_NAME).read_text())
    for name, message in ((EXPERT, "not? tensor"), (f"{EXPERT}_scale_inv", "its scales")):
        changed = {**index, "weight_map": dict(index["weight_map"])}
        del changed["weight_map"][name]
        (directory / INDEX_NAME).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(directory)
        assert name in str(caught.value)
    for escaping in ("../other.safetensors", "..", ""):
        weight_map = {**index["weight_map"], EXPERT: escaping}
        (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="not a plain file name"):
            load_model(directory)
    (directory / INDEX_NAME).write_text("[]")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(directory)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq'.*expected 'fp8'"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "e5m2"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "weight_block_size is None"),
        (None, "no quantization_config"),
        ("fp8", "config.json: quantization_config is 'fp8', expected a JSON object"),
        ([], r"quantization_config is \[\]"),
    ],
)
def test_unknown_quantisation(
    written: tuple[Path, R1Model], quantization: object, message: str
) -> None:
    directory, _ = written
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(directory)
