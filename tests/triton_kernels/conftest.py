"""The kernels run under triton's interpreter (see shim.py), or on a GPU with R1SAE_TEST_GPU=1."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from . import shim

pytest.importorskip("triton")
ON_GPU = os.environ.get("R1SAE_TEST_GPU") == "1"


@pytest.fixture(autouse=True)
def _mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        shim.install(monkeypatch)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels' tensors live."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=[None, 1, 2], ids=["in-turn", "order-1", "order-2"])
def grid_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in turn and in two random orders."""
    monkeypatch.setattr(shim.GridOrder, "seed", request.param)


CANARY = 64
"""Elements before and after a guarded buffer."""


class Canaries:
    """Buffers with a guard on both sides."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def around(self, wanted: torch.Tensor) -> torch.Tensor:
        """A buffer like ``wanted`` within a larger one, all of it poisoned."""
        whole = torch.empty(
            wanted.numel() + 2 * CANARY, dtype=wanted.dtype, device=wanted.device
        ).fill_(poison(wanted.dtype))
        self.buffers.append(whole)
        return whole[CANARY : CANARY + wanted.numel()].view(wanted.shape)

    def check(self) -> None:
        """Fails if a guard was written to, or if nothing was guarded."""
        assert self.buffers, "no buffer was made by new_empty: nothing was guarded"
        for whole in self.buffers:
            for side in (whole[:CANARY], whole[-CANARY:]):
                expected = torch.full_like(side, poison(side.dtype))
                assert torch.equal(side.view(torch.uint8), expected.view(torch.uint8)), (
                    "a kernel wrote outside its buffer"
                )


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every ``new_empty`` (the launchers' outputs and scratch) gets canaries on both sides, checked
    at the end, and is filled with NaN (integers: a huge number) first."""
    canaries = Canaries()
    plain = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: object, **options: object) -> torch.Tensor:
        return canaries.around(plain(self, *size, **options))  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    canaries.check()


def poison(dtype: torch.dtype) -> float | int:
    """What an unwritten element holds."""
    if dtype.is_floating_point:
        return float("nan")
    return torch.iinfo(dtype).max if dtype != torch.bool else True
