"""Whether the model still solves its problems with an SAE in the loop."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1sae_fast.evals.reconstruction import check_norm_limit
from r1sae_fast.evals.splice import Splice, attached_modes
from r1sae_fast.r1.engines.tapped import TappedEngine
from r1sae_fast.r1.generate import Generation
from r1sae_fast.r1.taps import Apply
from r1sae_fast.sae import FastSAE, Mode
from r1sae_fast.tiny_r1.evaluate import complete, held_out_problems, is_right, is_well_formed
from r1sae_fast.tiny_r1.problems import Problem

__all__ = ["Answers", "evaluate_all_answers", "evaluate_answers"]

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answers:
    """Shares between 0 and 1 over ``problems`` held-out problems of TinyR1's, answered greedily
    with the residual stream replaced by the SAE's reconstruction at every token, of the prompt and
    of what is written."""

    problems: int
    accuracy: float
    """Right final answers with the SAE in the loop."""
    accuracy_clean: float
    """Right final answers of the model undisturbed."""
    well_formed: float
    """With the SAE: outputs that think, close the thinking once, answer, and stop."""
    well_formed_clean: float
    same_text: float
    """Answers that are the undisturbed model's to the letter, thinking included."""
    by_family: dict[str, float]
    """With the SAE: accuracy of each family of problems."""
    point: str
    """Where the SAE stood in."""
    mode: Mode
    """How its codes were chosen."""
    l0: float
    """Its mean codes a token that was read."""

    @property
    def standard_error(self) -> float:
        """Of :attr:`accuracy`, as a share of independent draws."""
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / self.problems)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "standard_error": self.standard_error}


def evaluate_answers(
    sae: FastSAE,
    engine: TappedEngine,
    layer: int,
    *,
    count: int = 100,
    seed: int = 1,
    mode: Mode | None = None,
    norm_limit: float | None = None,
    progress: Report = lambda done, total, what: None,
) -> Answers:
    """How many of TinyR1's held-out problems the model solves, undisturbed and with the SAE.

    Args:
        sae: of the model's width, on the engine's device; left as it was.
        engine: of TinyR1, or of another model that answers as it does.
        layer: the hook point is ``model.layers.{layer}``, its output.
        count: number of problems, no two alike.
        seed: which problems.
        mode: how codes are chosen; default as for :func:`evaluate_in_model`.
        norm_limit: residuals of a larger norm are left as they are; default what training
            left out, as the SAE's metadata tell, else none.
        progress: called with (done, total, what).

    Raises:
        ValueError: no such layer, another d_in or device, a mode that is not to be had, or an
            argument out of range.
        NonFiniteError: the residual stream holds NaN or infinities.
    """
    (found,) = evaluate_all_answers(
        [sae],
        engine,
        layer,
        count=count,
        seed=seed,
        mode=mode,
        norm_limit=norm_limit,
        progress=progress,
    )
    return found


def evaluate_all_answers(
    saes: Sequence[FastSAE],
    engine: TappedEngine,
    layer: int,
    *,
    count: int = 100,
    seed: int = 1,
    mode: Mode | None = None,
    norm_limit: float | None = None,
    progress: Report = lambda done, total, what: None,
) -> list[Answers]:
    """:func:`evaluate_answers` of several SAEs; the undisturbed model answers once for all."""
    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1")
    engine.check_layer(layer)
    engine.check_head()
    splices = []
    for sae, own in zip(saes, attached_modes(saes, engine, mode), strict=True):
        limit = sae.metadata.get("norm_limit", math.inf) if norm_limit is None else norm_limit
        splices.append(Splice(sae, own, check_norm_limit(limit)))
    chosen = held_out_problems(count, seed)
    empty = [""] * count
    clean = complete(engine, chosen, empty, progress, "solving undisturbed")
    found = []
    for number, splice in enumerate(splices, 1):
        with engine.tap(Apply(layer, splice)):
            what = f"solving with SAE {number} of {len(splices)}"
            spliced = complete(engine, chosen, empty, progress, what)
        found.append(_compare(chosen, clean, spliced, splice, f"model.layers.{layer}"))
    return found


def _compare(
    problems: Sequence[Problem],
    clean: Sequence[Generation],
    spliced: Sequence[Generation],
    splice: Splice,
    point: str,
) -> Answers:
    def share(hits: Sequence[bool]) -> float:
        return sum(hits) / len(hits)

    right: dict[str, list[bool]] = defaultdict(list)
    for problem, answer in zip(problems, spliced, strict=True):
        right[problem.family].append(is_right(problem, answer))
    return Answers(
        problems=len(problems),
        accuracy=share([hit for hits in right.values() for hit in hits]),
        accuracy_clean=share([is_right(p, a) for p, a in zip(problems, clean, strict=True)]),
        well_formed=share([is_well_formed(a.text, a.finish_reason) for a in spliced]),
        well_formed_clean=share([is_well_formed(a.text, a.finish_reason) for a in clean]),
        same_text=share([a.text == b.text for a, b in zip(clean, spliced, strict=True)]),
        by_family={family: share(hits) for family, hits in sorted(right.items())},
        point=point,
        mode=splice.mode,
        l0=splice.figures().l0,
    )
