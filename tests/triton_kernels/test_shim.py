"""The shim is needed (the plain interpreter is wrong) and right (as torch computes it)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from . import shim
from .conftest import ON_GPU, Canaries

pytestmark = pytest.mark.skipif(ON_GPU, reason="about the interpreter")


@triton.jit
def dot_kernel(a, b, output, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(output + place, tl.dot(tl.load(a + place), tl.load(b + place)))


@triton.jit
def cast_kernel(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


@triton.jit
def add_kernel(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    loaded = tl.load(source + place)
    tl.store(target + place, loaded + loaded)


@triton.jit
def order_kernel(counter, output):
    turn = tl.atomic_add(counter, 1)
    tl.store(output + turn, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))


@triton.jit
def shifted_kernel(output, shift, SIZE: tl.constexpr):
    tl.store(output + shift + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32))


def dot(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    output = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, output, SIZE=16)
    return output, a.double() @ b.double()


def plain(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> object:
    """``run`` on the interpreter as it comes."""
    monkeypatch.undo()
    return run()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str
)
def test_dot_is_right(dtype: torch.dtype) -> None:
    found, exact = dot(dtype)
    assert (found - exact).abs().max() < 1e-5


def test_dot_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found, exact = plain(lambda: dot(torch.bfloat16), monkeypatch)  # type: ignore[misc]
    assert not (found - exact).abs().max() < 1


def cast(source: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    output = torch.empty(source.shape[0], dtype=target)
    cast_kernel[(1,)](source, output, SIZE=source.shape[0])
    return output


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a 16-bit or smaller float that is finite; else a spread of floats."""
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(4096, generator=generator) * torch.logspace(-6, 2, 4096)
        spread[:4] = torch.tensor([0.0, -0.0, 1.00390625, 448.0])
        return spread
    bits = {1: torch.int8, 2: torch.int16}[dtype.itemsize]
    every = torch.arange(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1))
    values = every.to(bits).view(dtype)
    return torch.where(values.float().isfinite(), values.float(), 1.0).to(dtype)


CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float8_e4m3fn),
    (torch.float8_e4m3fn, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float8_e4m3fn),
]


@pytest.mark.parametrize(("source", "target"), CASTS, ids=str)
def test_casts_are_right(source: torch.dtype, target: torch.dtype) -> None:
    given = numbers(source)
    if target == torch.float8_e4m3fn:
        given = given.float().clamp(-448, 448).to(source)  # beyond: NaN here, saturated on a GPU
    if target == torch.float16:
        given = given.float().clamp(-65504, 65504).to(source)
    assert torch.equal(cast(given, target).float(), given.to(target).float())


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_casts_need_it(target: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = numbers(torch.float32).clamp(-448, 448)
    found = plain(lambda: cast(given, target), monkeypatch)
    assert isinstance(found, torch.Tensor)
    assert not torch.equal(found.float(), given.to(target).float())


def test_arithmetic_on_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="cast to float32 after the load"):
        add_kernel[(1,)](source, torch.empty(8, dtype=torch.bfloat16), SIZE=8)
    plain(lambda: add_kernel[(1,)](source, source, SIZE=8), monkeypatch)
    assert not torch.equal(source.float(), torch.full((8,), 2.0))  # bits were added


def test_programs_run_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int | None) -> list[int]:
        monkeypatch.setattr(shim.GridOrder, "seed", seed)
        output = torch.full((6,), -1)
        order_kernel[(2, 3)](torch.zeros(1, dtype=torch.int32), output)
        return output.tolist()

    assert order(None) == list(range(6))
    orders = [order(1), order(2)]
    assert all(sorted(found) == list(range(6)) for found in orders)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_canaries_see_writes_on_either_side(shift: int) -> None:
    canaries = Canaries()
    with pytest.raises(AssertionError, match="nothing was guarded"):
        canaries.check()
    shifted_kernel[(1,)](canaries.around(torch.empty(16)), shift, SIZE=16)
    if shift:
        with pytest.raises(AssertionError, match="wrote outside its buffer"):
            canaries.check()
    else:
        canaries.check()
