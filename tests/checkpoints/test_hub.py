"""from_pretrained without a network: a local cache of the hub, and clear errors."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from r1sae_fast import FastSAE
from r1sae_fast.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached_repo(cache: Path, repo: str) -> Path:
    """The folder where huggingface_hub keeps the files of a repository at one commit."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_cached_repository(tmp_path: Path) -> None:
    sae = FastSAE(6, 16, 3)
    snapshot = cached_repo(tmp_path, "owner/name")
    sae.save(snapshot)
    sae.save(snapshot / "layer_3")
    for subfolder in (None, "layer_3"):
        loaded = FastSAE.from_pretrained(
            "owner/name",
            subfolder=subfolder,
            cache_dir=tmp_path,
            local_files_only=True,
            dtype=torch.bfloat16,
        )
        assert torch.equal(loaded.W_dec, sae.W_dec.bfloat16())


@pytest.mark.parametrize(("name", "k"), [("math", 128), ("logic", 64)])
def test_goodfires_repository(tmp_path: Path, name: str, k: int) -> None:
    repo = "Goodfire/DeepSeek-R1-SAE-l37"
    folder = cached_repo(tmp_path, repo) / name
    folder.mkdir()
    state = {"W": torch.randn(16, 200), "b_enc": torch.zeros(200), "b_dec": torch.zeros(16)}
    torch.save(state, folder / "DeepSeek-R1-SAE-l37.pt")
    sae = FastSAE.from_pretrained(repo, subfolder=name, cache_dir=tmp_path, local_files_only=True)
    assert (sae.k, sae.dtype) == (k, torch.bfloat16 if name == "math" else torch.float32)
    with pytest.raises(ValueError, match='expected subfolder="math" or "logic", found None'):
        FastSAE.from_pretrained(repo, cache_dir=tmp_path)


def test_not_in_the_cache_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"config\.json of owner/name is not in the local cache.*offline"
    with pytest.raises(CheckpointError, match=message):
        FastSAE.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=message):
        FastSAE.from_pretrained("owner/name", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["a/b/c", "no such folder", "../up"])
def test_neither_a_folder_nor_a_repository(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor"):
        FastSAE.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


def test_a_path_that_looks_like_one_but_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        FastSAE.from_pretrained(tmp_path / "missing", local_files_only=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="use load_math_sae or load_logic_sae"):
        FastSAE.from_pretrained(path)
