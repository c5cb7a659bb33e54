"""The ``versus`` fixture: our path beside its torch reference and beside peers, in one run.

    def test_topk(versus, shape, generator):
        x = torch.randn(shape.rows, shape.d_sae, generator=generator)
        versus("row top-k", ours=lambda: topk(x, shape.k), torch=lambda: topk_reference(x, shape.k),
               peer=lambda: torch.topk(x, shape.k), work=(shape.rows, "rows"))

It times all in turns (see :mod:`harness.timing`), prints one line each at the end of the session,
and hands ours to pytest-benchmark with the others' medians and ratios as ``extra_info``. Check
results in the test, before: no speed of a wrong answer.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

from harness.timing import OURS, REFERENCE, Budget, Call, Result, timed, warm_up


@dataclass
class Versus:
    """One bench's contest; see the module."""

    benchmark: Any
    """pytest-benchmark's fixture."""
    shape: str
    """The size's name, which becomes part of the result's."""
    test: str
    """Where the bench stands, as pytest takes it: ``path::name``."""
    seconds: float
    """How long a contest may take, unless it says so itself."""
    results: list[Result] = field(default_factory=list)
    """Every result of the session."""

    def __call__(
        self,
        name: str,
        *,
        ours: Call,
        torch: Call,
        work: tuple[float, str] | None = None,
        rounds: int | None = None,
        seconds: float | None = None,
        notes: dict[str, Any] | None = None,
        compared: bool = True,
        **peers: Call,
    ) -> Result:
        """Times ``ours`` against ``torch``, the plain reference, and against peers.

        Args:
            name: the operation and its size; unique in the session.
            work: how much one call does and of what, such as ``(1024, "rows")``.
            rounds: of each contender; default as many as the budget allows, 5 to 200.
            seconds: the budget for all rounds together.
            notes: what else the result should say (bytes moved, candidates, ...).
            compared: whether bench-check compares it with the baseline; not where the ratio is the
                disk's rather than ours.

        Raises:
            ValueError: a second contest of that name.
        """
        name = f"{self.shape}: {name}"
        if any(result.name == name for result in self.results):
            raise ValueError(f"two contests are called {name!r}; give each its own name")
        rivals = {REFERENCE: torch, **peers}
        budget = Budget(rounds, self.seconds if seconds is None else seconds)
        rounds = budget.rounds_for(warm_up({**rivals, OURS: ours}))
        times: dict[str, list[float]] = {contender: [] for contender in (OURS, *rivals)}

        def others_turn() -> None:
            for contender, call in rivals.items():
                times[contender].append(timed(call))

        def our_turn() -> None:
            times[OURS].append(timed(ours))

        self.benchmark.group = name
        gc.collect()
        gc.disable()
        try:
            self.benchmark.pedantic(our_turn, setup=others_turn, rounds=rounds, warmup_rounds=0)
        finally:
            gc.enable()
        result = Result(name, times, work, notes or {}, self.test, compared)
        self.results.append(result)
        self.benchmark.extra_info.update(result.summary())
        return result
