"""What a step asks of the other processes, and the answers where there are none.

A step sees the rows of the whole batch, and the features that its rank has. Between the two stand
the calls below: what is found and decoded is shared out by rows among the ranks that have the same
features, and what a row is decoded to is the sum over the ranks that have the other ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor

from r1sae_fast.codes import SparseCodes

if TYPE_CHECKING:
    from r1sae_fast.train.losses.base import Finder

Number = TypeVar("Number", float, Tensor)


class Ranks(Protocol):
    """The processes of a run. All of them make the same calls in the same order."""

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and speaks."""

    @property
    def part(self) -> tuple[int, int]:
        """(number of this process, number of processes): which rows of a batch it reads."""

    def own(self, d_sae: int) -> tuple[int, int]:
        """The features that this rank has: from, to."""

    def finder(self, find: Finder, features: int) -> Finder:
        """Finds codes among those of all ranks, where ``find`` does among its ``features`` own
        ones: own codes of all rows."""

    def decoded(self, decode: Callable[[SparseCodes], Tensor], codes: SparseCodes) -> Tensor:
        """``[rows, d_in]``: what the codes of all ranks make, where ``decode`` tells what own
        ones do."""

    def total(self, value: Number, /) -> Number:
        """The sum over the shares of the features; a number, or a tensor of one."""

    def before(self, value: int) -> int:
        """The sum over the shares of the features that come before this rank's."""

    def least(self, value: float) -> float:
        """The least over the shares of the features."""

    def rows(self, rows: Tensor, left_out: int) -> tuple[Tensor, int]:
        """The batch of which each process has read a part, and how many rows were left out."""

    def agree(self, *told: bool) -> tuple[bool, ...]:
        """Of each, whether any process was told so."""

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's; of the same shape and dtype as this one's."""

    def pieces(self, tensor: Tensor, *, split: bool) -> Iterator[Tensor]:
        """The whole of a tensor on the CPU, piece by piece, for the first process; for others
        nothing. ``split``: it lies with the features."""

    def require_equal(self, tensors: Iterable[Tensor]) -> None:
        """Raises RuntimeError where ranks that train the same weights have come apart."""


class Alone:
    """One process, which has all rows and features."""

    is_first = True
    part = (0, 1)

    def own(self, d_sae: int) -> tuple[int, int]:
        """All of them."""
        return 0, d_sae

    def finder(self, find: Finder, features: int) -> Finder:
        """As it is."""
        return find

    def decoded(self, decode: Callable[[SparseCodes], Tensor], codes: SparseCodes) -> Tensor:
        """As it is."""
        return decode(codes)

    def total(self, value: Number, /) -> Number:
        """As it is."""
        return value

    def before(self, value: int) -> int:
        """Nothing."""
        return 0

    def least(self, value: float) -> float:
        """As it is."""
        return value

    def rows(self, rows: Tensor, left_out: int) -> tuple[Tensor, int]:
        """As they are."""
        return rows, left_out

    def agree(self, *told: bool) -> tuple[bool, ...]:
        """As told."""
        return told

    def from_first(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def pieces(self, tensor: Tensor, *, split: bool) -> Iterator[Tensor]:
        """The tensor."""
        yield tensor.detach().cpu()

    def require_equal(self, tensors: Iterable[Tensor]) -> None:
        """There is nobody else."""


ALONE = Alone()
