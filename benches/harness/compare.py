"""Results beside a baseline: which of our paths have become slower, and by how much."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.timing import REFERENCE
from r1sae_fast.atomic import write_bytes

TOLERANCE = 0.2
"""How much of its lead over the reference a path may lose without a word."""
FATAL = 0.2
"""How much it may lose, beyond what the baseline's own runs differed by, before the check fails."""
MOST_SPREAD = 0.25
"""How much a baseline's runs may differ; with more, even half the speed might be chance."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long the torch reference takes as ours does."""

    ratio: float
    """The median over the rounds."""
    best_ratio: float
    """Of the least disturbed rounds."""
    spread: float = 0.0
    """Of a baseline: the part of it that the worst of its own runs had lost, by chance alone."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Ratio:
        """That of a :meth:`harness.timing.Result.summary`."""
        return cls(float(result["ratio"][REFERENCE]), float(result["best_ratio"][REFERENCE]))

    def kept_of(self, baseline: Ratio) -> float:
        """The part of the baseline that is left, 1 being all of it.

        The better of the two measures: what makes a path slower shows in both, while a busy
        machine spoils now the one and now the other.
        """
        return max(self.ratio / baseline.ratio, self.best_ratio / baseline.best_ratio)


@dataclass(frozen=True)
class Verdict:
    """One contest's outcome."""

    name: str
    found: Ratio | None
    """None: the bench is gone."""
    baseline: Ratio | None
    """None: a new bench."""
    tolerance: float
    fatal: float

    def _lost_more_than(self, part: float) -> bool:
        if self.baseline is None:
            return False
        return self.found is None or self.found.kept_of(self.baseline) < 1 - part

    @property
    def slow(self) -> bool:
        """Slower than the tolerance allows, or gone."""
        return self._lost_more_than(self.tolerance)

    @property
    def failed(self) -> bool:
        """So much slower that it can't be chance, or gone."""
        chance = 0.0 if self.baseline is None else self.baseline.spread
        return self._lost_more_than(max(self.fatal + chance, self.tolerance))

    def line(self) -> str:
        """The outcome for people."""
        if self.found is None:
            return (
                f"GONE  {self.name}: in the baseline, but not run (if meant: make bench-baseline)"
            )
        found = f"{self.found.ratio:.2f}x the torch reference"
        if self.baseline is None:
            return f"new   {self.name}: {found} (no baseline yet: make bench-baseline)"
        change = self.found.kept_of(self.baseline) - 1
        mark = "SLOW " if self.failed else "slow " if self.slow else "ok   "
        return f"{mark} {self.name}: {found}, baseline {self.baseline.ratio:.2f}x ({change:+.0%})"


def compare(
    results: Iterable[Mapping[str, Any]],
    baseline: Mapping[str, Ratio],
    tolerance: float = TOLERANCE,
    fatal: float = FATAL,
) -> list[Verdict]:
    """A verdict for each result and each line of the baseline."""
    found = {r["name"]: Ratio.of(r) for r in results if r["compared"]}
    names = [*found, *(name for name in baseline if name not in found)]
    return [Verdict(name, found.get(name), baseline.get(name), tolerance, fatal) for name in names]


def better(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one of two results of a contest that was disturbed less: noise slows, and more often than
    not the path with more threads."""
    winner = max(first, second, key=lambda result: Ratio.of(result).ratio)
    best = max(Ratio.of(first).best_ratio, Ratio.of(second).best_ratio)
    return {**winner, "best_ratio": {**winner["best_ratio"], REFERENCE: best}}


def read_baseline(path: Path) -> dict[str, Ratio]:
    """The ratios of a file that :func:`write_baseline` wrote.

    Raises:
        ValueError: another kind of file.
    """
    try:
        ratios = json.loads(path.read_text())["ratios"]
        return {name: Ratio(**ratio) for name, ratio in ratios.items()}
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no baseline ({error!r}); make bench-baseline") from None


def write_baseline(path: Path, runs: list[dict[str, Any]]) -> None:
    """Writes the medians of several runs on one machine, and how far the worst fell short.

    Raises:
        ValueError: runs that differ so much that even half the speed might be chance.
    """
    ratios: dict[str, list[Ratio]] = {}
    for run in runs:
        for result in filter(lambda result: result["compared"], run["results"]):
            ratios.setdefault(result["name"], []).append(Ratio.of(result))
    content = {
        "machine": runs[-1]["machine"],
        "when": runs[-1]["when"],
        "runs": len(runs),
        "ratios": {name: _middle(found) for name, found in sorted(ratios.items())},
    }
    for name, line in content["ratios"].items():
        if line["spread"] > MOST_SPREAD:
            raise ValueError(
                f"{name}: runs differ by {line['spread']:.0%}, more than {MOST_SPREAD:.0%}; "
                "measure on a quieter machine"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _middle(runs: list[Ratio]) -> dict[str, float]:
    """The line of a baseline that several runs of one contest make."""
    middle = Ratio(
        round(statistics.median(run.ratio for run in runs), 3),
        round(statistics.median(run.best_ratio for run in runs), 3),
    )
    spread = max(0.0, 1 - min(run.kept_of(middle) for run in runs))
    return {"ratio": middle.ratio, "best_ratio": middle.best_ratio, "spread": round(spread, 3)}
