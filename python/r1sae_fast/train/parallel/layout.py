"""How many processes share the rows of a batch, and how many the features."""

from __future__ import annotations

from dataclasses import dataclass

_MOST = 4096


@dataclass(frozen=True)
class Layout:
    """``data * latents`` processes: rank r has share ``r // latents`` of the rows to encode, and
    share ``r % latents`` of the features.

    Args:
        data: parts that the rows of a batch are encoded in; all of them train the same weights,
            so weights and Adam's state are kept so many times.
        latents: parts that the features are kept in: each has its share of encoder, decoder and
            Adam's state, so that together they train an SAE that is too wide for one.
        timeout_seconds: after so long a rank that waits for another one gives up. (One that dies
            is noticed at once.)

    Raises:
        TypeError, ValueError: a number out of its range.
    """

    data: int = 1
    latents: int = 1
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("data", "latents"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"parallel.{name} is {value!r}; expected an int")
            if not 1 <= value <= _MOST:
                raise ValueError(f"parallel.{name} is {value}; expected 1 to {_MOST}")
        seconds = self.timeout_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"parallel.timeout_seconds is {seconds!r}; expected a number")
        if not 1.0 <= seconds <= 1e6:  # written so that a NaN fails
            raise ValueError(f"parallel.timeout_seconds is {seconds}; expected 1 to 1e6")

    @property
    def processes(self) -> int:
        """In all."""
        return self.data * self.latents

    def require(self, processes: int, d_sae: int) -> None:
        """Raises ValueError where there are other than so many processes, or too few features."""
        if processes != self.processes:
            raise ValueError(
                f"there are {processes} processes; data = {self.data} x latents = {self.latents} "
                f"needs {self.processes}: start so many, or change [parallel]"
            )
        if self.latents > d_sae:
            raise ValueError(
                f"parallel.latents is {self.latents}, more than d_sae = {d_sae} features; "
                "expected at most that"
            )
