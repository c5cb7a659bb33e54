"""Bars met and missed, a line each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.timing import Result


@dataclass(frozen=True)
class Bar:
    """One demand and what was found."""

    bar: str
    """The name in the issue: P1, ..."""
    what: str
    found: float
    least: float | None = None
    most: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Within both bounds."""
        return (self.least is None or self.found >= self.least) and (
            self.most is None or self.found <= self.most
        )

    def line(self) -> str:
        """For people."""
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        mark = "met   " if self.met else "MISSED"
        return f"{mark} {self.bar} {self.what}: {self.found:.3g} {self.unit} (bar {bound})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "met": self.met}


@dataclass
class Section:
    """What one section found."""

    results: list[Result]
    bars: list[Bar]

    def lines(self) -> Iterable[str]:
        """Contests, then bars."""
        yield from (result.line() for result in self.results)
        yield from (bar.line() for bar in self.bars)
