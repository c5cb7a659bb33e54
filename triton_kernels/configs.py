"""Launch settings, by kernel family and architecture.

A small table that was reasoned out and compiled ahead of time, not tuned at import: no start-up
cost, and the same kernel every time. ``tune.py`` measures others on the user's own device and
writes a file; ``load`` puts such a file in force.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from r1sae_fast.triton_kernels.launch import current_target
from r1sae_fast.triton_kernels.targets import INTERPRETER, TARGETS

__all__ = ["Config", "config", "default_configs", "load", "reset", "save", "using"]


@dataclass(frozen=True)
class Config:
    """Block sizes (the kernel's constants) and the warps and pipeline stages of a program."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1
    reason: str = field(default="", compare=False)

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of :func:`r1sae_fast.triton_kernels.launch.launch`."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


# What is fastest under the interpreter is few, wide operations; what tests a kernel is several
# programs and ragged ends, so its blocks are small.
_TABLE: dict[str, dict[str, Config]] = {
    "decode": {
        "default": Config(
            {"BLOCK_K": 8, "BLOCK_D": 256},
            num_warps=4,
            reason="a warp reads 512 bytes of one feature (16 a thread) and the four warps eight "
            "features at once; 256 columns of all 28,672 features in bf16 are 15 MB, which the L2 "
            "of an A100 (40 MB), H100 (50), B200 (126) and MI300X (256 MB MALL) keeps while all "
            "rows pass over them",
        ),
        "gfx942": Config(
            {"BLOCK_K": 8, "BLOCK_D": 512},
            num_warps=4,
            reason="as the default, for wavefronts of 64 threads",
        ),
        INTERPRETER: Config({"BLOCK_K": 4, "BLOCK_D": 32}),
    },
    "gradient_of_values": {
        "default": Config(
            {"BLOCK_K": 8, "BLOCK_D": 512},
            num_warps=4,
            reason="each chunk of codes ends in a sum across a warp, so the tile is twice as wide "
            "as decode's; 512 columns of 28,672 features in bf16 are 29 MB, which an H100's L2 "
            "(50 MB) and an A100's (40) still hold",
        ),
        INTERPRETER: Config({"BLOCK_K": 4, "BLOCK_D": 32}),
    },
    "gradient_of_weight": {
        "default": Config(
            {"BLOCK_K": 8, "BLOCK_D": 256},
            num_warps=4,
            reason="decode transposed: a warp reads 512 bytes of one row's gradient, 256 columns "
            "of 4,096 rows are 2 MB of L2",
        ),
        "gfx942": Config({"BLOCK_K": 8, "BLOCK_D": 512}, num_warps=4, reason="wavefronts of 64"),
        INTERPRETER: Config({"BLOCK_K": 4, "BLOCK_D": 32}),
    },
    "act_quant": {
        "default": Config(
            {"GROUPS": 8},
            num_warps=4,
            reason="1,024 numbers a program: 16 bytes a thread in bf16, a group's maximum within "
            "16 threads",
        ),
        "gfx942": Config({"GROUPS": 16}, num_warps=4, reason="the same with 64 threads a wave"),
        INTERPRETER: Config({"GROUPS": 2}),
    },
    "block_fp8_gemm": {
        "default": Config(
            {"BLOCK_M": 128, "BLOCK_N": 128, "STEP": 128},
            num_warps=8,
            num_stages=4,
            reason="128 columns share a scale; two warp groups of 64 x 128; four stages of 32 KB "
            "keep loads in flight within 228 KB",
        ),
        "sm_80": Config(
            {"BLOCK_M": 64, "BLOCK_N": 128, "STEP": 32},
            num_warps=8,
            num_stages=4,
            reason="bytes become float16 in registers: 64 rows and 32 of the inner dimension fit",
        ),
        "gfx942": Config(
            {"BLOCK_M": 128, "BLOCK_N": 128, "STEP": 32},
            num_warps=8,
            num_stages=2,
            reason="as sm_80; two stages fit 64 KB of LDS",
        ),
        INTERPRETER: Config({"BLOCK_M": 16, "BLOCK_N": 64, "STEP": 64}),
    },
    "block_fp8_gemm, few rows": {
        "default": Config(
            {"BLOCK_M": 64, "BLOCK_N": 128, "STEP": 128},
            num_warps=4,
            num_stages=4,
            reason="steps of generation: the time is that of reading the weight; 64 rows are the "
            "least that a warp group's instruction takes",
        ),
        "sm_80": Config(
            {"BLOCK_M": 32, "BLOCK_N": 128, "STEP": 32}, 4, 4, "as above, with 16-row instructions"
        ),
        "gfx942": Config({"BLOCK_M": 32, "BLOCK_N": 128, "STEP": 32}, 4, 2, "the same"),
        INTERPRETER: Config({"BLOCK_M": 16, "BLOCK_N": 64, "STEP": 64}),
    },
    "encode_gemm, half": {
        "default": Config(
            {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64},
            num_warps=8,
            num_stages=3,
            reason="the largest tile whose sums fit the registers of two warp groups; three "
            "stages of 48 KB",
        ),
        "sm_80": Config(
            {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32},
            num_warps=8,
            num_stages=4,
            reason="sums and operands share 255 registers; four stages of 16 KB",
        ),
        "sm_100": Config(
            {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
            num_warps=8,
            num_stages=4,
            reason="sums leave tensor memory all at once, so the tile is half as wide",
        ),
        "gfx942": Config(
            {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
            num_warps=8,
            num_stages=2,
            reason="one stage of 32 KB, and the maxima's exchange, within 64 KB of LDS",
        ),
        INTERPRETER: Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}),
    },
    "encode_gemm, float32": {
        "default": Config(
            {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16},
            num_warps=8,
            num_stages=3,
            reason="IEEE float32 has no tensor cores: 32 sums a thread, operands through shared "
            "memory",
        ),
        INTERPRETER: Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}),
    },
    "encode_gemm, ragged": {
        "default": Config(
            {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
            num_warps=4,
            num_stages=2,
            reason="rows that do not begin at multiples of 16 bytes are loaded number by number, "
            "which takes registers",
        ),
        INTERPRETER: Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}),
    },
    "select_topk": {
        "default": Config(
            {},
            num_warps=4,
            reason="64 x 32 candidates are 16 registers a thread; four warps exchange sums quickly",
        ),
    },
    "select_topk, large k": {
        "default": Config({}, num_warps=8, reason="512 x 16 candidates are 32 registers a thread"),
    },
    "kth_value": {
        "default": Config(
            {"BLOCK": 2048, "REPEAT": 8},
            num_warps=4,
            reason="16,384 numbers a program: 256 counters are added to memory once for them",
        ),
        INTERPRETER: Config({"BLOCK": 32, "REPEAT": 2}),
    },
    "row_kth": {
        "default": Config(
            {"BLOCK": 2048}, num_warps=4, reason="as kth_value; a row in 14 blocks, read four times"
        ),
        INTERPRETER: Config({"BLOCK": 64}),
    },
    "collect": {
        "default": Config(
            {"BLOCK": 32},
            num_warps=4,
            reason="32 groups of 32 at once, eight numbers a thread: most blocks of a row hold a "
            "code or two",
        ),
        INTERPRETER: Config({"BLOCK": 2}),
    },
    "quantise_rows": {
        "default": Config({"BLOCK": 1024}, num_warps=4, reason="8 numbers a thread; two passes"),
        INTERPRETER: Config({"BLOCK": 32}),
    },
    "int8_gemm": {
        "default": Config(
            {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128},
            num_warps=8,
            num_stages=3,
            reason="64 sums a thread leave room for the bounds made of them; stages of 32 KB",
        ),
        "sm_100": Config(
            {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128},
            num_warps=8,
            num_stages=3,
            reason="as the default, half as wide: its sums leave tensor memory all at once",
        ),
        "gfx942": Config(
            {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
            num_warps=8,
            num_stages=2,
            reason="within 64 KB of LDS",
        ),
        INTERPRETER: Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}),
    },
    "row_bound": {
        "default": Config({}, num_warps=4, reason="eight maxima a thread"),
    },
    "sae_tap": {
        "default": Config(
            {"BLOCK_D": 1024}, num_warps=4, reason="16 bytes a thread in bf16, few programs a row"
        ),
        "gfx942": Config({"BLOCK_D": 2048}, num_warps=4, reason="the same with 64 threads a wave"),
        INTERPRETER: Config({"BLOCK_D": 32}),
    },
    "encode_append": {
        "default": Config(
            {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64},
            num_warps=8,
            num_stages=3,
            reason="32 sums a thread: the 8-byte keys and places made of them take the rest",
        ),
        "sm_80": Config(
            {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 3, "the same, 16 sums a thread"
        ),
        "gfx942": Config(
            {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, 8, 2, "the same within 64 KB of LDS"
        ),
        INTERPRETER: Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}),
    },
    "select_listed": {
        "default": Config({}, num_warps=8, reason="at most 4,096 keys of 8 bytes"),
    },
}
_loaded: dict[str, dict[str, Config]] = {}


def default_configs() -> dict[str, dict[str, Config]]:
    """The built-in table: family, then target (``default``: those not named)."""
    return {family: dict(by_target) for family, by_target in _TABLE.items()}


def config(family: str, device: torch.device) -> Config:
    """The settings in force for a kernel family on a device."""
    target = current_target(device)
    by_target = _TABLE[family]
    loaded = _loaded.get(family, {}).get(target)
    return loaded or by_target.get(target) or by_target["default"]


def save(path: str | PathLike[str], measured: dict[str, dict[str, Config]]) -> None:
    """Writes settings as JSON: family, target, settings."""
    from r1sae_fast.atomic import write_bytes

    table = {f: {t: asdict(c) for t, c in by.items()} for f, by in measured.items()}
    write_bytes(Path(path), (json.dumps(table, indent=2) + "\n").encode())


def load(path: str | PathLike[str]) -> None:
    """Puts the settings of a file that :func:`save` wrote in force, before the built-in ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; names what is wrong in it.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected a file the tuner wrote") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds a {type(table).__name__}; expected families by name")
    found: dict[str, dict[str, Config]] = {}
    for family, by_target in table.items():
        if family not in _TABLE:
            raise ValueError(
                f"{path}: kernel family {family!r} is not known; expected one of {sorted(_TABLE)}"
            )
        if not isinstance(by_target, dict):
            raise ValueError(f"{path}: {family} is not a table of targets")
        found[family] = {
            target: _parsed(f"{path}: {family}: {target}", family, target, raw)
            for target, raw in by_target.items()
        }
    _loaded.update(found)


@contextmanager
def using(family: str, target: str, settings: Config) -> Iterator[None]:
    """Puts one setting in force for a while."""
    before = _loaded.get(family, {})
    _loaded[family] = {**before, target: settings}
    try:
        yield
    finally:
        _loaded[family] = before


def reset() -> None:
    """Back to the built-in table."""
    _loaded.clear()


def _parsed(where: str, family: str, target: str, raw: Any) -> Config:
    if target not in TARGETS:
        raise ValueError(f"{where}: not a known target; expected one of {sorted(TARGETS)}")
    names = set(_TABLE[family]["default"].blocks)
    if not isinstance(raw, dict) or not isinstance(raw.get("blocks"), dict):
        raise ValueError(f"{where}: expected blocks, num_warps and num_stages")
    blocks = raw["blocks"]
    if set(blocks) != names:
        raise ValueError(f"{where}: blocks are {sorted(blocks)}, expected {sorted(names)}")
    numbers = {**blocks, "num_warps": raw.get("num_warps"), "num_stages": raw.get("num_stages")}
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}: {name} is {value!r}, expected a whole number above 0")
        if name != "num_stages" and value & (value - 1):
            raise ValueError(f"{where}: {name} is {value}, expected a power of two")
    return Config(dict(blocks), raw["num_warps"], raw["num_stages"], str(raw.get("reason", "")))
