"""The table of launch settings, files of measured ones, and the search for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from r1sae_fast.triton_kernels import configs
from r1sae_fast.triton_kernels.configs import Config
from r1sae_fast.triton_kernels.launch import recording
from r1sae_fast.triton_kernels.tune import candidates, fastest

CPU = torch.device("cpu")
OTHER = Config({"BLOCK_K": 4, "BLOCK_D": 128}, num_warps=2, num_stages=2)


@pytest.fixture(autouse=True)
def _built_in() -> Iterator[None]:
    yield
    configs.reset()


def on(target: str) -> Config:
    with recording(target):
        return configs.config("decode", CPU)


def test_each_setting_has_a_reason() -> None:
    for family, by_target in configs.default_configs().items():
        assert "default" in by_target
        for target, settings in by_target.items():
            assert settings.reason or target == "interpreter", (family, target)
            assert set(settings.blocks) == set(by_target["default"].blocks)


def test_a_file_comes_first_and_only_for_its_target(tmp_path: Path) -> None:
    before = on("sm_80")
    configs.save(tmp_path / "own.json", {"decode": {"sm_90": OTHER}})
    configs.load(tmp_path / "own.json")
    assert on("sm_90") == OTHER
    assert on("sm_80") == before
    with configs.using("decode", "sm_80", OTHER):
        assert on("sm_80") == OTHER
    assert on("sm_80") == before
    configs.reset()
    assert on("sm_90") != OTHER


BLOCKS = {"BLOCK_K": 8, "BLOCK_D": 256}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list; expected families"),
        ({"gemm": {}}, "kernel family 'gemm' is not known; expected one of"),
        ({"decode": 3}, "decode is not a table of targets"),
        ({"decode": {"sm_75": {}}}, "not a known target; expected one of"),
        ({"decode": {"sm_90": {}}}, "expected blocks, num_warps and num_stages"),
        ({"decode": {"sm_90": {"blocks": {"X": 1}}}}, "blocks are"),
        (
            {"decode": {"sm_90": {"blocks": BLOCKS, "num_warps": 3, "num_stages": 1}}},
            "power of two",
        ),
        ({"decode": {"sm_90": {"blocks": BLOCKS, "num_warps": 4}}}, "num_stages is None"),
    ],
)
def test_files_that_are_not_the_tuners(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    before = on("sm_90")
    with pytest.raises(ValueError, match=message):
        configs.load(path)
    assert on("sm_90") == before


def test_the_search_takes_the_fastest_that_runs() -> None:
    start = Config({"BLOCK": 8}, num_warps=4, num_stages=2)
    tried = candidates(start)
    assert tried[0] == start
    assert len({str(c) for c in tried}) == len(tried) == 7

    def time(config: Config) -> float:
        if config.blocks["BLOCK"] == 16:
            raise RuntimeError("out of resource: shared memory")
        return float(config.num_warps)

    best = fastest(tried, time)
    assert best is not None
    assert (best[0].num_warps, best[1]) == (2, 2.0)
    assert fastest([], time) is None
