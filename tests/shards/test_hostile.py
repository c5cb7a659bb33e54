"""Files that are not what the manifest says: refused, and named."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1sae_fast import SparseCodes, _core
from r1sae_fast.errors import ShardError
from r1sae_fast.shards import ActivationShards, ActivationWriter, CodeShards, CodeWriter

HOSTILE = Path(__file__).parent / "hostile"


def load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_hostile", HOSTILE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()
FILES = {hostile.name: hostile for hostile in make.files()}


def test_the_files_are_what_the_script_makes() -> None:
    kept = {path.stem: path.read_bytes() for path in HOSTILE.glob("*.safetensors")}
    assert kept == {name: hostile.content for name, hostile in FILES.items()}


def list_file(folder: Path, kind: str, path: Path) -> None:
    """A manifest with one line that fits the file on the outside."""
    width = make.D_IN if kind == "activations" else make.D_SAE
    header = {"format": "r1sae-shards", "version": 1, "kind": kind, "d": width, "dtype": "float32"}
    size, xxh3 = _core.checksum_file(path)
    entry = {"file": path.name, "rows": make.ROWS, "bytes": size, "xxh3": xxh3}
    (folder / "manifest.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(entry)}\n")


@pytest.mark.parametrize("name", FILES)
def test_hostile_file(tmp_path: Path, name: str) -> None:
    hostile = FILES[name]
    path = tmp_path / f"{name}.safetensors"
    shutil.copy(HOSTILE / path.name, path)
    list_file(tmp_path, hostile.kind, path)
    kind = ActivationShards if hostile.kind == "activations" else CodeShards
    steps = {
        "open": lambda: kind(tmp_path),
        "read": lambda: kind(tmp_path)[:],
        "verify": lambda: kind(tmp_path).verify(),
    }
    for stage, step in steps.items():
        if stage == hostile.stage:
            break
        step()  # is not yet found out
    with pytest.raises(ShardError) as caught:
        step()
    assert hostile.says in str(caught.value)
    assert path.name in str(caught.value)
    if hostile.stage == "read":
        with pytest.raises(ShardError, match=path.name):
            kind(tmp_path).verify()


@pytest.fixture
def activations(folder: Path) -> Path:
    with ActivationWriter(folder, 4, "float32", rows_per_shard=10) as writer:
        writer.write(torch.randn(25, 4), tokens=torch.arange(25))
    return folder


@pytest.fixture
def codes(folder: Path) -> Path:
    with CodeWriter(folder, 30, rows_per_shard=10) as writer:
        writer.write(SparseCodes.from_dense(torch.rand(25, 30).sub(0.7).relu()))
    return folder


def test_truncated(activations: Path) -> None:
    path = ActivationShards(activations).paths[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"shard-000001\.safetensors: truncated"):
        ActivationShards(activations)


def test_oversized(codes: Path) -> None:
    path = CodeShards(codes).paths[2]
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    with pytest.raises(ShardError, match=r"shard-000002\.safetensors: oversized"):
        CodeShards(codes)


def test_missing(codes: Path) -> None:
    CodeShards(codes).paths[1].unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.safetensors: missing"):
        CodeShards(codes)


def test_missing_after_opening(activations: Path) -> None:
    shards = ActivationShards(activations)
    shards.paths[0].unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.safetensors"):
        shards.verify()


def test_a_folder_in_place_of_a_file(activations: Path) -> None:
    path = ActivationShards(activations).paths[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(ShardError, match=r"shard-000000\.safetensors: not a regular file"):
        ActivationShards(activations)


def test_swapped_shards(activations: Path) -> None:
    """Whole and well-formed, but another shard than the one listed."""
    first, second, _ = ActivationShards(activations).paths
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    shards = ActivationShards(activations)
    with pytest.raises(ShardError, match=r"shard-000000.*shard-000001.*2 of 3 shards"):
        shards.verify()


def test_other_number_of_rows(activations: Path) -> None:
    first, _, last = ActivationShards(activations).paths
    shutil.copy(last, first)
    with pytest.raises(ShardError, match=r"shard-000000.* holds 5 rows, the manifest says 10"):
        ActivationShards(activations)


@settings(max_examples=40)
@given(st.data())
def test_every_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        with CodeWriter(folder, 30, rows_per_shard=10) as writer:
            writer.write(SparseCodes.from_dense(torch.rand(25, 30).sub(0.7).relu()))
    path = folder / "shard-000001.safetensors"
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(changed)
        with pytest.raises(ShardError, match=r"shard-000001\.safetensors"):
            CodeShards(folder).verify()
    finally:
        path.write_bytes(whole)
    CodeShards(folder).verify()


@settings(max_examples=150)
@given(st.data())
def test_altered_files_never_give_wrong_codes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever the bytes, reading ends in codes within bounds or in a named error."""
    folder = tmp_path_factory.getbasetemp() / "altered"
    folder.mkdir(exist_ok=True)
    path = folder / "altered.safetensors"
    content = bytearray(make.file_of(make.codes()))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    list_file(folder, "codes", path)
    try:
        batch = CodeShards(folder)[:]
    except ShardError as error:
        refusal = str(error)
    else:
        assert bool((batch.codes.indices >= 0).all())
        assert bool((batch.codes.indices < make.D_SAE).all())
        return
    assert path.name in refusal


HEADER = (
    '{"format": "r1sae-shards", "version": 1, "kind": "activations", "d": 4, "dtype": "float32", '
    '"metadata": {}}\n'
)
ENTRY = '{"file": "shard-000000.safetensors", "rows": 1, "bytes": 1, "xxh3": "0123456789abcdef"}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty or without a header"),
        (HEADER[:-1], "empty or without a header"),
        ("\n", "line 1 is not JSON"),
        ("{}\n", "not a shard manifest"),
        ("[]\n", "line 1 is not a JSON object"),
        ('{"format": "other"}\n', "format is 'other'"),
        (HEADER.replace('"version": 1', '"version": 2'), "version 2 of the shard format"),
        (HEADER.replace("activations", "pictures"), "kind 'pictures'"),
        (HEADER.replace('"d": 4', '"d": -4'), "d -4"),
        (HEADER.replace('"d": 4', '"d": true'), "d True"),
        (HEADER.replace("float32", "float64"), "dtype 'float64' are not known"),
        (HEADER.replace("{}", "[]"), "metadata is not an object"),
        (HEADER + "\n", "line 2 is not JSON"),
        (HEADER + '{"a":' * 200_000 + "\n", "line 2 is not JSON"),
        (HEADER + ENTRY[:40] + "\n", "line 2 is not JSON"),
        (HEADER + '{"file": "shard-000000.safetensors"}\n', "line 2 does not describe a shard"),
        (HEADER + ENTRY.replace("shard-", "../shard-"), "line 2 does not describe a shard"),
        (HEADER + ENTRY.replace('"rows": 1', '"rows": -1'), "line 2 does not describe a shard"),
        (HEADER + ENTRY.replace('"rows": 1', '"rows": 1.5'), "line 2 does not describe a shard"),
        (HEADER + ENTRY.replace("0123", "XYZW"), "line 2 does not describe a shard"),
        (HEADER + ENTRY + ENTRY, "line 3 lists shard-000000.safetensors again"),
        (HEADER + ENTRY, "missing, although the manifest lists it"),
    ],
)
def test_bad_manifest(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(ShardError) as caught:
        ActivationShards(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_binary_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(b"\xff\x00\xfe\n")
    with pytest.raises(ShardError, match="line 1 is not JSON"):
        ActivationShards(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"it has no manifest\.jsonl"):
        ActivationShards(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ActivationShards(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="not a folder of shards"):
        CodeShards(tmp_path / "file")
