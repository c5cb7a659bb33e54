"""One safetensors file: what the header says, what is mapped, what is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.shard_file import ShardFile, read_header


def write(path: Path, header: Any, data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def line(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 3).to(torch.float8_e4m3fn),
        "d": torch.arange(4),
        "e": torch.zeros(0, 4),
        "f": torch.tensor(3.5),
        "g": torch.tensor([True, False]),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = ShardFile(path)
    assert set(file.entries) == set(tensors)
    for name, expected in tensors.items():
        found = file.tensor(name)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(found.float(), expected.float()), name
        file.will_need(name)
        file.release(name)
        assert torch.equal(found.float(), expected.float()), name  # read again from the file
    kept = file.tensor("a")
    file.close()
    assert torch.equal(kept, tensors["a"])
    assert torch.equal(file.tensor("a"), tensors["a"])  # opened again


def test_writing_to_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    ShardFile(path).tensor("a").fill_(7)
    assert path.read_bytes() == before


def test_unaligned_tensors(tmp_path: Path) -> None:
    numbers = torch.tensor([1.5, -2.0])
    data = b"\x07" + numbers.numpy().tobytes()
    header = {"one": line("U8", [1], 0, 1), "two": line("F32", [2], 1, 9)}
    file = ShardFile(write(tmp_path / "x", header, data))
    assert torch.equal(file.tensor("two"), numbers)


def test_a_dtype_that_torch_lacks_hurts_only_when_asked_for(tmp_path: Path) -> None:
    header = {"odd": line("F4", [4], 0, 2), "even": line("U8", [2], 2, 4)}
    file = ShardFile(write(tmp_path / "x", header, b"\x00\x00\x05\x06"))
    assert file.tensor("even").tolist() == [5, 6]
    with pytest.raises(CheckpointError, match=r"'odd' is F4, expected one of"):
        file.tensor("odd")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": line("F32", [2], 0, 4)}, 4, r"'a' is F32 \(2,\), 8 bytes, but .* span 4"),
        ({"a": line("F32", [1], 4, 0)}, 4, "'a' has no two data_offsets"),
        ({"a": line("F32", [-1], 0, 4)}, 4, "'a' has no shape"),
        ({"a": {"shape": [1], "data_offsets": [0, 1]}}, 1, "'a' has no dtype"),
        ({"a": line("U8", [4], 0, 4), "b": line("U8", [4], 2, 6)}, 6, "'a' and 'b' overlap"),
        ({"a": line("U8", [4], 0, 4), "b": line("U8", [1], 5, 6)}, 6, "'a' and 'b' leave a hole"),
        ({"a": line("U8", [4], 1, 5)}, 5, "'the header' and 'a' leave a hole"),
        ({"a": line("U8", [2**62, 4], 0, 4)}, 4, "'a' is U8"),
        ({"a": "text"}, 0, "'a' is no JSON object"),
        ({"a": line("U8", [4], 0, 4)}, 3, "truncated"),
        ({"a": line("U8", [4], 0, 4)}, 5, "longer than it should be"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_header(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing; fetch it again"):
        read_header(tmp_path / "nowhere")
