"""Makes the hostile shards beside this file: ``python tests/shards/hostile/make.py``.

Each is a small file that a reader must refuse, or find out on reading, without a crash.
``test_hostile.py`` checks that the files are what this makes, and how each is refused.
They also seed the fuzz target (``rust/fuzz``).
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS, D_IN, D_SAE = 2, 3, 8
SIZES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "U16": 2, "F32": 4, "I32": 4, "I64": 8, "F64": 8}


@dataclass(frozen=True)
class Hostile:
    """A file and how it is refused."""

    name: str
    kind: str
    content: bytes
    says: str
    stage: str = "open"  # or "read", or "verify"


Tensor = tuple[str, str, list[int], bytes]


def prefix(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def file_of(tensors: list[Tensor], pad: int = 64, **changes: Any) -> bytes:
    """A safetensors file; ``changes`` replace entries of its header."""
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape, data in tensors:
        end = offset + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    for name, change in changes.items():
        header[name] = {**header.get(name, {}), **change}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % pad)
    return prefix(text) + b"".join(data for *_, data in tensors)


def column(name: str, dtype: str, rows: int = ROWS) -> Tensor:
    return name, dtype, [rows], bytes(SIZES[dtype] * rows)


def columns() -> list[Tensor]:
    return [
        column("sequence_id", "I64"),
        column("position", "I32"),
        column("tokens", "I32"),
        column("segment", "U8"),
    ]


def activations(dtype: str = "F32") -> list[Tensor]:
    wide, *narrow = columns()
    data = bytes(ROWS * D_IN * SIZES[dtype])
    return [wide, ("activations", dtype, [ROWS, D_IN], data), *narrow]


def codes(
    offsets: tuple[int, ...] = (0, 1, 2),
    indices: tuple[int, ...] = (5, 7),
    values: tuple[float, ...] = (1.0, 0.5),
) -> list[Tensor]:
    wide, *narrow = columns()
    return [
        ("row_offsets", "I64", [len(offsets)], struct.pack(f"<{len(offsets)}q", *offsets)),
        wide,
        ("values", "F32", [len(values)], struct.pack(f"<{len(values)}f", *values)),
        *narrow[:2],
        ("indices", "U16", [len(indices)], struct.pack(f"<{len(indices)}H", *indices)),
        narrow[2],
    ]


def without(tensors: list[Tensor], name: str) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor[0] != name]


def files() -> Iterator[Hostile]:
    """All hostile files."""
    whole = file_of(activations())
    yield from (
        Hostile(name, "activations", content, says)
        for name, content, says in [
            ("empty", b"", "truncated: 0 bytes"),
            ("seven-bytes", whole[:7], "truncated: 7 bytes"),
            ("header-length-huge", struct.pack("<Q", 2**64 - 1) + whole[8:], "not a shard"),
            ("header-past-the-end", whole[:100], "truncated: the header alone takes"),
            ("header-not-utf8", prefix(b'{"\xff\xfe":1}'), "not a safetensors file"),
            ("header-not-json", prefix(b"{'activations': 1}      "), "not a safetensors file"),
            ("header-a-list", prefix(b"[1, 2, 3]"), "not a safetensors file"),
            ("header-nested", prefix(b'{"a":' * 5000), "not a safetensors file"),
            ("header-negative-offset", file_of(activations(), activations={
                "data_offsets": [-24, 0]}), "not a safetensors file"),
            ("no-tensors", prefix(b"{}      "), "no tensor `activations`"),
            ("a-torch-pickle", b"PK\x03\x04" + bytes(60), "not a shard"),
            ("truncated", whole[:-1], "truncated: its header describes"),
            ("oversized", whole + b"\0", "oversized: its header describes"),
            ("tensors-overlap", file_of(activations(), position={
                "data_offsets": [32, 40]}), "not a safetensors file"),
            ("shape-overflows", file_of(activations(), activations={
                "shape": [2**62, 2**62]}), "not a safetensors file"),
            ("shape-larger-than-data", file_of(activations(), activations={
                "shape": [ROWS, D_IN + 1]}), "not a safetensors file"),
            ("foreign-weights", file_of([("weight", "F32", [2, 2], bytes(16))]),
             "no tensor `activations` (it holds weight)"),
            ("foreign-tensor-too", file_of([*activations(), ("weight", "U8", [2], bytes(2))]),
             "it also holds a tensor `weight`"),
            ("tokens-missing", file_of(without(activations(), "tokens")), "no tensor `tokens`"),
            ("tokens-of-floats", file_of(activations(), tokens={"dtype": "F32"}),
             "tensor `tokens` has dtype F32, expected I32"),
            ("tokens-too-few", file_of([*without(activations(), "tokens"), column(
                "tokens", "I32", 1)], 64), "tensor `tokens` has 1 elements, expected 2"),
            ("tokens-a-matrix", file_of(activations(), tokens={"shape": [1, ROWS]}),
             "tensor `tokens` has shape [1, 2], expected one dimension"),
            ("activations-double", file_of([("activations", "F64", [ROWS, D_IN], bytes(48)),
             *columns()]), "tensor `activations` has dtype F64"),
            ("activations-flat", file_of(activations(), activations={"shape": [ROWS * D_IN]}),
             "tensor `activations` has shape [6], expected [rows, d_in]"),
            ("activations-without-width", file_of([("activations", "F32", [ROWS, 0], b""),
             *columns()]), "d_in = 0"),
            ("activations-of-other-width", file_of(activations(), activations={
                "shape": [D_IN, ROWS]}), "expected 3"),
            ("fp8-without-scales", file_of(activations("F8_E4M3")), "no tensor `scales`"),
            ("other-dtype-than-listed", file_of(activations("BF16")),
             "holds BF16 activations of width 3, the manifest says F32 of width 3"),
            ("not-aligned", file_of([column("segment", "U8"), *without(activations(), "segment")]),
             "can't be read in place"),
            ("codes-instead", file_of(codes()), "no tensor `activations`"),
        ]
    )  # fmt: skip
    yield from (
        Hostile(f"codes-{name}", "codes", content, says, stage)
        for name, content, says, stage in [
            ("activations-instead", whole, "no tensor `row_offsets`", "open"),
            ("truncated", file_of(codes())[:-3], "truncated: its header describes", "open"),
            ("offsets-empty", file_of(codes(offsets=())), "`row_offsets` is empty", "open"),
            ("offsets-do-not-start-at-0", file_of(codes((1, 1, 2))), "go from 1 to 2", "open"),
            ("offsets-end-late", file_of(codes((0, 1, 3))), "go from 0 to 3", "open"),
            ("offsets-end-below-0", file_of(codes((0, 1, -1))), "go from 0 to -1", "open"),
            ("offsets-fall", file_of(codes((0, 3, 2))), "not in order", "read"),
            ("offsets-wrap", file_of(codes((0, -(2**63), 2))), "not in order", "read"),
            ("index-too-large", file_of(codes(indices=(5, 8))), "feature index of 8", "read"),
            ("indices-too-few", file_of(codes(indices=(5,))), "`indices` has 1 elem", "open"),
            ("indices-of-floats", file_of(codes(), indices={"dtype": "BF16"}),
             "tensor `indices` has dtype BF16, expected U16 or U32", "open"),
            ("value-nan", file_of(codes(values=(1.0, float("nan")))), "NaN or inf", "verify"),
            ("values-rise", file_of(codes((0, 0, 2), values=(0.5, 1.0))),
             "row 1 is out of order", "verify"),
            ("tie-out-of-order", file_of(codes((0, 2, 2), (7, 5), (1.0, 1.0))),
             "row 0 is out of order", "verify"),
            ("feature-twice", file_of(codes((0, 2, 2), (7, 7))),
             "row 0 names feature 7 more than once", "verify"),
            ("value-infinite", file_of(codes(values=(float("inf"), 1.0))), "NaN or inf", "verify"),
        ]
    )  # fmt: skip


def write(folder: Path) -> None:
    """Writes all of them to ``folder``."""
    for hostile in files():
        (folder / f"{hostile.name}.safetensors").write_bytes(hostile.content)


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
