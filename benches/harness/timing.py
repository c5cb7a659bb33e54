"""Contenders timed in turns, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

OURS, REFERENCE = "ours", "torch"
MIN_ROUNDS, MAX_ROUNDS = 5, 200
SLOW = 0.5
"""Seconds of a call that is warm after one."""

Call = Callable[[], object]


@dataclass
class Result:
    """The times of one operation: seconds of each round, by contender, ours among them."""

    name: str
    seconds: dict[str, list[float]]
    work: tuple[float, str] | None = None
    """How much one call does, and of what: ``(1024, "tokens")``."""
    notes: dict[str, Any] = field(default_factory=dict)
    test: str = ""
    """The bench that it comes from, as pytest takes it: ``path::name``."""
    compared: bool = True
    """Whether bench-check compares it with the baseline."""

    def median(self, contender: str = OURS) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds[contender])

    def ratio(self, contender: str = REFERENCE) -> float:
        """How many times as long the contender takes as ours: the median over the rounds, each of
        which compares two calls made right after one another."""
        pairs = zip(self.seconds[contender], self.seconds[OURS], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def best_ratio(self, contender: str = REFERENCE) -> float:
        """As :meth:`ratio`, of each contender's least disturbed round."""
        return min(self.seconds[contender]) / min(self.seconds[OURS])

    @property
    def others(self) -> list[str]:
        """All contenders but ours."""
        return [name for name in self.seconds if name != OURS]

    def line(self) -> str:
        """The result on one line: ours, then each other with its ratio to ours."""
        ours = self.median()
        parts = [f"{self.name}: ours {duration(ours)}"]
        if self.work is not None:
            amount, unit = self.work
            parts[0] += f" ({quantity(amount / ours)} {unit}/s)"
        parts += [
            f"{name} {duration(self.median(name))} = {self.ratio(name):.2f}x"
            for name in self.others
        ]
        return " | ".join(parts)

    def summary(self) -> dict[str, Any]:
        """What is written to JSON."""
        return {
            "name": self.name,
            "median_s": {name: self.median(name) for name in self.seconds},
            "min_s": {name: min(times) for name, times in self.seconds.items()},
            "ratio": {name: self.ratio(name) for name in self.others},
            "best_ratio": {name: self.best_ratio(name) for name in self.others},
            "rounds": len(self.seconds[OURS]),
            "work": self.work,
            "notes": self.notes,
            "test": self.test,
            "compared": self.compared,
        }


@dataclass(frozen=True)
class Budget:
    """How long to time: rounds, where given; else as many as ``seconds`` allow."""

    rounds: int | None = None
    seconds: float = 1.0

    def rounds_for(self, one_round: float) -> int:
        """Rounds of all contenders together, each round taking so many seconds."""
        if self.rounds is not None:
            return self.rounds
        return max(MIN_ROUNDS, min(MAX_ROUNDS, int(self.seconds / max(one_round, 1e-9))))


def timed(call: Call) -> float:
    """Seconds of one call; its result is dropped outside of them."""
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def warm_up(calls: Mapping[str, Call]) -> float:
    """Calls each once, quick ones twice; returns the seconds of a round."""
    seconds = 0.0
    for call in calls.values():
        took = timed(call)
        seconds += timed(call) if took < SLOW else took
    return seconds


def in_turns(name: str, calls: Mapping[str, Call], budget: Budget | None = None) -> Result:
    """Times the calls in turns, ``ours`` being one of them: a, b, ours, a, b, ours, ...

    Raises:
        ValueError: no contender is called ``ours``.
    """
    if OURS not in calls:
        raise ValueError(f"{name}: no contender is called {OURS!r}; found {sorted(calls)}")
    rounds = (budget or Budget()).rounds_for(warm_up(calls))
    seconds: dict[str, list[float]] = {contender: [] for contender in calls}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for contender, call in calls.items():
                seconds[contender].append(timed(call))
    finally:
        if enabled:
            gc.enable()
    return Result(name, seconds)


def duration(seconds: float) -> str:
    """``1.23 ms``."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def quantity(amount: float) -> str:
    """``1.23 G``."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= factor:
            return f"{amount / factor:.3g} {unit}"
    return f"{amount:.3g}"
