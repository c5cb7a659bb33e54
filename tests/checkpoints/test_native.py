"""Saving, loading, and what happens when either goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1sae_fast import FastSAE
from r1sae_fast.errors import CheckpointError
from r1sae_fast.sae import MODES, Mode


def make(
    tied: bool = False, mode: Mode = "topk", dtype: torch.dtype = torch.float32, seed: int = 0
) -> FastSAE:
    torch.manual_seed(seed)
    sae = FastSAE(6, 16, 3, mode, tied=tied, dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.threshold = torch.tensor(0.3)
    return sae


def same(left: FastSAE, right: FastSAE) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return (
        left.config == right.config
        and left.metadata == right.metadata
        and list(ours) == list(theirs)
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip(tmp_path: Path, tied: bool, mode: Mode, dtype: torch.dtype) -> None:
    sae = make(tied, mode, dtype)
    sae.metadata = {"model": "tiny-r1", "layer": 3, "list": [1, None, 0.5], "ﬁ": "é"}
    folder = tmp_path / "new" / "folder"
    sae.save(folder)
    again = FastSAE.load(folder)
    assert same(again, sae)
    assert again.dtype == dtype
    assert again.W_enc.stride() == sae.W_enc.stride()
    assert all(parameter.requires_grad for parameter in again.parameters())
    x = torch.randn(4, 6)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert same(FastSAE.from_pretrained(folder), sae)
    assert same(FastSAE.from_pretrained(tmp_path / "new", subfolder="folder"), sae)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors"]


def test_the_files_are_what_other_tools_expect(tmp_path: Path) -> None:
    sae = make()
    sae.save(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "W_enc": (6, 16),
        "W_dec": (16, 6),
        "b_enc": (16,),
        "b_dec": (6,),
        "threshold": (),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["d_sae"] == 16
    assert config["dtype"] == "float32"
    make(tied=True).save(tmp_path)
    assert "W_enc" not in load_file(tmp_path / "sae.safetensors")


def test_threshold_per_feature_survives(tmp_path: Path) -> None:
    sae = make(mode="threshold")
    sae.threshold = torch.linspace(0, 1, 16)
    sae.save(tmp_path)
    assert torch.equal(FastSAE.load(tmp_path).threshold, sae.threshold)
    assert FastSAE.load(tmp_path, dtype=torch.bfloat16).threshold.dtype == torch.float32


def test_load_to_another_dtype_and_device(tmp_path: Path) -> None:
    sae = make()
    sae.save(tmp_path)
    assert torch.equal(FastSAE.load(tmp_path, dtype=torch.bfloat16).W_dec, sae.W_dec.bfloat16())
    assert FastSAE.load(tmp_path, device="meta").W_dec.device.type == "meta"
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        FastSAE.load(tmp_path, dtype=torch.int8)


@pytest.mark.parametrize("tied", [False, True])
def test_training_a_loaded_sae_leaves_the_file_alone(tmp_path: Path, tied: bool) -> None:
    sae = make(tied)
    sae.save(tmp_path)
    before = (tmp_path / "sae.safetensors").read_bytes()
    loaded = FastSAE.load(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert (tmp_path / "sae.safetensors").read_bytes() == before
    # Saved over the very file that is mapped.
    loaded.save(tmp_path)
    assert same(FastSAE.load(tmp_path), loaded)
    assert torch.equal(loaded.W_dec, sae.W_dec + 1)


def test_a_save_cut_short_leaves_a_whole_sae(tmp_path: Path) -> None:
    """After the first rename the weights are new and config.json is old."""
    old, new = make(seed=0), make(tied=True, seed=1)
    old.save(tmp_path / "sae")
    new.save(tmp_path / "other")
    os.replace(tmp_path / "other" / "sae.safetensors", tmp_path / "sae" / "sae.safetensors")
    with pytest.warns(UserWarning, match="differs from the config inside") as caught:
        loaded = FastSAE.load(tmp_path / "sae")
    assert same(loaded, new)
    assert caught[0].filename == __file__
    loaded.save(tmp_path / "sae")
    assert same(FastSAE.load(tmp_path / "sae"), new)


_FULL_DISK = """
import resource, signal, sys, torch
from r1sae_fast import FastSAE
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sae = FastSAE(64, 512, 3)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    sae.save(sys.argv[1])
except OSError as error:
    print("OSError", error)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    old = make()
    old.save(tmp_path)
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OSError")
    assert "sae.safetensors" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]
    assert same(FastSAE.load(tmp_path), old)


def test_metadata_that_is_not_json_writes_nothing(tmp_path: Path) -> None:
    sae = make()
    sae.metadata = {"layer": object()}
    with pytest.raises(TypeError, match="JSON"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "sae").write_text("mine")
    with pytest.raises(FileExistsError):
        make().save(tmp_path / "sae")
    assert (tmp_path / "sae").read_text() == "mine"


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        FastSAE.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no sae\.safetensors"):
        FastSAE.load(tmp_path)


@pytest.mark.parametrize("cut", [0, 5, 40, -1, -100])
def test_truncated_weights_are_refused(tmp_path: Path, cut: int) -> None:
    make().save(tmp_path)
    path = tmp_path / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"sae\.safetensors is no safetensors file"):
        FastSAE.load(tmp_path)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    make().save(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"PK\x03\x04 something else entirely" * 10)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        FastSAE.load(tmp_path)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """The saved weights with some tensors changed or left out, without a config in the header."""
    tensors = load_file(folder / "sae.safetensors")
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    kept = {name: t for name, t in tensors.items() if changes.get(name, t) is not None}
    save_file(kept, folder / "sae.safetensors")


def test_config_json_alone_will_do(tmp_path: Path) -> None:
    sae = make()
    sae.save(tmp_path)
    rewrite(tmp_path, threshold=None)
    loaded = FastSAE.load(tmp_path)
    assert torch.equal(loaded.W_dec, sae.W_dec)
    assert loaded.threshold < 0
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json, nor a config inside"):
        FastSAE.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"W_dec": None}, r"lacks W_dec; found tensors: W_enc, b_dec, b_enc, threshold"),
        ({"W_enc": None}, "lacks W_enc"),
        ({"W_dec": torch.ones(6, 16)}, r"W_dec has shape \(6, 16\); expected \(16, 6\)"),
        ({"W_enc": torch.ones(16, 6)}, r"W_enc has shape \(16, 6\); expected \(6, 16\)"),
        ({"b_enc": torch.ones(15)}, r"b_enc has shape \(15,\); expected \(16,\)"),
        ({"b_dec": torch.ones(1)}, r"b_dec has shape \(1,\); expected \(6,\)"),
        ({"threshold": torch.ones(3)}, r"threshold has shape \(3,\); expected \(\) or \(16,\)"),
        ({"b_dec": torch.ones(6, dtype=torch.int32)}, r"b_dec is torch\.int32"),
        ({"extra": torch.ones(1)}, "holds extra besides"),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], text: str
) -> None:
    make().save(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=text) as caught:
        FastSAE.load(tmp_path)
    assert "sae.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", r"config\.json is not JSON"),
        (b"\xff\xfe", r"config\.json is not JSON"),
        (b"[]", "is list; expected a JSON object"),
        (b"{}", "not the config of an SAE"),
        (b'{"format": "r1sae-sae", "version": 9}', "version 9"),
    ],
)
def test_bad_config_files_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    make().save(tmp_path)
    rewrite(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        FastSAE.load(tmp_path)
