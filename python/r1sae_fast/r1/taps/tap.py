"""What all taps share: a point, a choice of tokens, and their place in a call of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.r1.taps.points import parse_point
from r1sae_fast.r1.taps.where import Forward, Where
from r1sae_fast.sae import FastSAE


@dataclass(frozen=True)
class Call:
    """What a tap is told at the beginning of an engine's call.

    Attributes:
        hidden_size, dtype, device: of the residual stream.
        count: sequences of the call.
        lengths: of them; None where they are still being written.
        expected: about so many tokens will pass, where the taps choose all.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    count: int
    lengths: Sequence[int] | None
    expected: int


class Tap(ABC):
    """Reads or writes the values at one point of the model.

    Attributes:
        point: where; ``str(tap.point)`` is its name.
        where: which tokens.
    """

    def __init__(self, point: str | int, where: Where) -> None:
        self.point = parse_point(point)
        self.where = where

    def start(self, call: Call) -> None:
        """Called before each call of an engine; raises ValueError where this tap does not fit."""
        try:
            self.where.check(call.count, call.lengths)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None

    @abstractmethod
    def visit(self, value: Tensor, forward: Forward) -> Tensor:
        """Called in each forward, which engines run without gradients, with the value
        [batch, seq, hidden] at the point; returns what goes on in its place."""

    def finish(self) -> None:
        """Called at the end of each call that was not broken off."""
        return

    def _require_sae(self, sae: FastSAE, call: Call) -> None:
        if sae.d_in != call.hidden_size:
            raise ValueError(
                f"{self}: the SAE has d_in {sae.d_in}, the model a residual stream of "
                f"{call.hidden_size}; give an SAE of this model"
            )
        self._require_device("the SAE", sae.device, "sae", call)

    def _require_device(self, what: str, found: torch.device, name: str, call: Call) -> None:
        if found.type != call.device.type or (
            None not in (found.index, call.device.index) and found.index != call.device.index
        ):
            raise ValueError(
                f"{self}: {what} lies on {found}, the engine on {call.device}; "
                f"use {name}.to({str(call.device)!r})"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.point)!r})"
