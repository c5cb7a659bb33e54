"""How features are explained and scored: delphi's default sizes, all of them settable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from r1sae_fast.labels.prompts import VERSION

SCORERS = ("detection", "fuzzing")


@dataclass(frozen=True)
class LabelSettings:
    """Sizes and seeds. The defaults are those of EleutherAI's delphi.

    Args:
        explain: windows of text shown to the model that explains.
        test: other windows where the feature is active, to score by.
        negatives: windows where it is not active, to score by.
        quantiles: of a window's strongest activation; each gives an equal share of ``explain``
            and ``test``.
        context: tokens of a window.
        shown: windows in one prompt of a scorer.
        threshold: tokens of at least this share of their window's maximum are marked.
        min_windows: features active in fewer windows keep their counted label alone (delphi
            wants 200).
        min_negatives: and so do features that are active nearly everywhere.
        explain_tokens: completion tokens of an explanation at most; reasoning counts.
        score_tokens: completion tokens of a scorer's answer at most.
        scorers: which scores; of ``detection`` and ``fuzzing``, or none.
        seed: of every choice.

    Raises:
        ValueError: a size that makes no sense.
    """

    explain: int = 40
    test: int = 50
    negatives: int = 50
    quantiles: int = 10
    context: int = 32
    shown: int = 5
    threshold: float = 0.3
    min_windows: int = 20
    min_negatives: int = 20
    explain_tokens: int = 4096
    score_tokens: int = 4096
    scorers: tuple[str, ...] = SCORERS
    seed: int = 22

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name not in ("threshold", "scorers")):
            least = 0 if name == "seed" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.explain % self.quantiles or self.test % self.quantiles:
            raise ValueError(
                f"explain is {self.explain} and test {self.test}; expected multiples of quantiles, "
                f"{self.quantiles}"
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; expected more than 0, at most 1")
        unknown = [name for name in self.scorers if name not in SCORERS]
        if unknown:
            raise ValueError(f"no scorer {unknown[0]!r}; expected some of {', '.join(SCORERS)}")
        if self.min_windows < 2:
            raise ValueError("min_windows is 1; expected at least 2: one explains, one tests")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "scorers": list(self.scorers)}

    @property
    def prompt_version(self) -> str:
        """What labels made so are kept under: the prompts' version, and a mark of other settings.

        So labels made with different settings stand side by side and are never mixed.
        """
        usual = LabelSettings().to_dict()
        # What only decides whether there is a label changes none.
        no_matter = {"min_windows", "min_negatives", "explain_tokens", "score_tokens"}
        mine = {k: v for k, v in self.to_dict().items() if k not in no_matter}
        other = {k: v for k, v in mine.items() if v != usual[k]}
        if not other:
            return VERSION
        mark = hashlib.sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()[:6]
        return f"{VERSION}+{mark}"
