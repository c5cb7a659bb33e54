"""What TinyR1 can do, measured on problems that no training run has seen.

The "Wait" figures need no taste: a trace is cut right after the result of one of its steps, once
with the right result and once with a plausible wrong one. The model then writes its own check and
comparison, greedily, and the probability of "Wait" is read at the token after these.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.chat import Tokenizer
from r1sae_fast.r1.engines.generating import GeneratingEngine
from r1sae_fast.r1.generate import Generation
from r1sae_fast.tiny_r1.problems import Problem, distinct, problems
from r1sae_fast.tiny_r1.traces import OPENING, trace

_ANSWER = re.compile(r"The answer is (\w+)\.\Z")
_MAX_NEW_TOKENS = 256
_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Shares between 0 and 1 over ``problems`` held-out problems."""

    model: str
    problems: int
    accuracy: float
    """Right final answers, greedy decoding."""
    well_formed: float
    """Outputs that think, close the thinking once, answer, and stop."""
    wait_after_wrong: float
    """Mean P("Wait") after the model's check of a planted wrong step."""
    wait_after_right: float
    """Mean P("Wait") after the model's check of the same step done right."""
    wait_auroc: float
    """Probability that a wrong step gets more P("Wait") than a right one; 0.5 is chance."""
    recovered: float
    """Right final answers when greedy decoding goes on after a planted wrong step."""
    by_family: dict[str, float]
    """Accuracy of each problem family."""

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON."""
        return asdict(self)


def final_answer(response: str) -> str | None:
    """The answer that a response states, or None."""
    match = _ANSWER.search(response.strip())
    return match.group(1) if match else None


def is_well_formed(text: str, finish_reason: str) -> bool:
    """Whether the text after ``<think>\\n`` opens as R1 does, closes its thinking exactly once,
    gives an answer, and ends by itself."""
    thinking, mark, response = text.partition("</think>")
    return (
        mark != ""
        and finish_reason == "stop"
        and thinking.startswith(OPENING)
        and "think>" not in thinking + response
        and final_answer(response) is not None
    )


def auroc(positive: list[float], negative: list[float]) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half."""
    both = torch.tensor(positive + negative, dtype=torch.float64)
    _, inverse, counts = torch.unique(both, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    ranks = (ends - (counts - 1) / 2)[inverse]
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def is_right(problem: Problem, generation: Generation) -> bool:
    """Whether the final answer that was written is the problem's."""
    return final_answer(generation.text.partition("</think>")[2]) == problem.answer


def held_out_problems(count: int, seed: int) -> list[Problem]:
    """``count`` problems that TinyR1 was not trained on, no two alike."""
    return list(islice(distinct(problems(seed, held_out=True)), count))


def cut_trace(problem: Problem, rng: random.Random, *, slip: bool) -> str:
    """A trace of ``problem`` that ends right after one step's result, wrong if ``slip``."""
    chosen = rng.randrange(len(problem.steps))
    slips = problem.steps[chosen].slips
    wrong = rng.choice(slips)
    text = ""
    results = 0
    for piece in trace(problem):
        if piece.kind == "result":
            # Each step has three: its own, its check's and the comparison's.
            if results == 3 * chosen:
                return text + (f" {wrong}" if slip else piece.text) + "."
            results += 1
        text += piece.text
    raise AssertionError("a trace has three results a step")


def complete(
    engine: GeneratingEngine,
    chosen: Sequence[Problem],
    prefixes: Sequence[str],
    progress: Callable[[int, int, str], None],
    what: str,
) -> list[Generation]:
    """Goes on greedily from each problem's prompt and the beginning of its trace (which may be
    empty); ``progress`` is called with (done, total, what)."""
    starts = [
        engine.encode_prompt(problem.prompt, prefill=prefix)
        for problem, prefix in zip(chosen, prefixes, strict=True)
    ]
    results: list[Generation] = []
    for first in range(0, len(starts), _BATCH):
        results += engine.generate(
            starts[first : first + _BATCH],
            max_new_tokens=_MAX_NEW_TOKENS,
            greedy=True,
        )
        progress(len(results), len(starts), what)
    return results


def _tokenizer(engine: LocalEngine) -> Tokenizer:
    if engine.tokenizer is None:
        raise CheckpointError("the checkpoint has no tokenizer; TinyR1's evaluation needs one")
    return engine.tokenizer


def _wait_probability(
    engine: LocalEngine,
    written: list[Generation],
    otherwise: float,
    progress: Callable[[int, int, str], None],
) -> list[float]:
    """P("Wait") right after the first comparison that the model wrote to each cut trace;
    ``otherwise``, the worst case, where it wrote none."""
    tokenizer = _tokenizer(engine)
    period, wait, compare = (tokenizer.encode(text)[0] for text in (".", " Wait", " Compare"))
    found: list[float] = []
    for first in range(0, len(written), _BATCH):
        cut = []
        for generation in written[first : first + _BATCH]:
            tokens, start = generation.tokens, generation.prompt_length
            ends = [
                place + 1
                for place in range(start, len(tokens))
                if tokens[place] == period and compare in tokens[start:place]
            ]
            cut.append(tokens[: ends[0]] if ends else [])
        lengths = [len(tokens) for tokens in cut]
        padded = [tokens + [0] * (max(lengths) - len(tokens)) for tokens in cut]
        logits = engine.logits(padded, lengths=lengths).softmax(-1)[..., wait]
        found += [
            float(row[length - 1]) if length else otherwise
            for row, length in zip(logits, lengths, strict=True)
        ]
        progress(len(found), len(written), "reading P(Wait)")
    return found


def evaluate(
    model: str,
    *,
    count: int = 700,
    seed: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Evaluation:
    """Runs every check on ``count`` held-out problems.

    Args:
        model: a checkpoint folder, or "tiny-r1".
        count: number of problems, no two alike.
        seed: which problems and which planted errors.
        progress: called with (done, total, what).
    """
    engine = LocalEngine.from_pretrained(model)
    chosen = held_out_problems(count, seed)
    answers = complete(engine, chosen, [""] * count, progress, "solving")
    right: dict[str, list[bool]] = defaultdict(list)
    formed = 0
    for problem, answer in zip(chosen, answers, strict=True):
        right[problem.family].append(is_right(problem, answer))
        formed += is_well_formed(answer.text, answer.finish_reason)
    waits: dict[bool, list[float]] = {}
    repaired = 0
    for slip in (False, True):
        prefixes = [
            cut_trace(problem, random.Random(f"{seed}/{index}"), slip=slip)
            for index, problem in enumerate(chosen)
        ]
        what = "going on after a wrong step" if slip else "going on after a right step"
        written = complete(engine, chosen, prefixes, progress, what)
        waits[slip] = _wait_probability(engine, written, 0.0 if slip else 1.0, progress)
        if slip:
            repaired = sum(map(is_right, chosen, written))
    return Evaluation(
        model=model,
        problems=count,
        accuracy=sum(map(sum, right.values())) / count,
        well_formed=formed / count,
        wait_after_wrong=sum(waits[True]) / count,
        wait_after_right=sum(waits[False]) / count,
        wait_auroc=auroc(waits[True], waits[False]),
        recovered=repaired / count,
        by_family={family: sum(hits) / len(hits) for family, hits in sorted(right.items())},
    )
