"""Choosing the instruction set."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from r1sae_fast import ops


@pytest.fixture(autouse=True)
def _auto_simd() -> Iterator[None]:
    yield
    ops.set_simd("auto")


def test_every_available_level_can_be_forced() -> None:
    info = ops.simd_info()
    assert info.available[0] == "scalar"
    assert info.active in info.available
    for level in info.available:
        assert ops.set_simd(level) == level
        assert ops.simd_info().active == level
    assert ops.set_simd("auto") == info.available[-1]


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="sse9"):
        ops.set_simd("sse9")
    missing = {"avx2", "avx512"} - set(ops.simd_info().available)
    for level in missing:
        with pytest.raises(ValueError, match="lacks"):
            ops.set_simd(level)


@pytest.mark.parametrize(
    ("value", "expected"), [("scalar", "scalar"), ("", None), ("sse9", "error")]
)
def test_the_environment_variable_is_read_at_first_use(value: str, expected: str | None) -> None:
    code = "from r1sae_fast import _core; print(_core.simd_info()[0])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "R1SAE_SIMD": value},
        capture_output=True,
        text=True,
        check=False,
    )
    if expected == "error":
        assert done.returncode != 0
        assert "R1SAE_SIMD" in done.stderr
        assert "sse9" in done.stderr
    else:
        best = ops.simd_info().available[-1]
        assert done.stdout.strip() == (expected or best)
