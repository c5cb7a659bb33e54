"""The texts of the demo: what TinyR1 thinks itself, and traces written with planted slips."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from r1sae_fast.atomic import write_bytes
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.tiny_r1.evaluate import final_answer
from r1sae_fast.tiny_r1.problems import Problem, distinct, problems
from r1sae_fast.tiny_r1.traces import trace

_BATCH = 128
_MAX_NEW_TOKENS = 300


@dataclass(frozen=True)
class OwnTrace:
    """What the model thought about a held-out problem."""

    prompt: str
    answer: str
    """The right one."""
    tokens: list[int]
    """Of the whole sequence, prompt included."""
    prompt_length: int
    text: str
    """What the model wrote."""

    @property
    def right(self) -> bool:
        """Whether the model's final answer is the right one."""
        return final_answer(self.text.partition("</think>")[2]) == self.answer


def own_problems(seed: int, count: int) -> list[Problem]:
    """The held-out problems that the model thinks about."""
    return list(islice(problems(seed + 101, held_out=True), count))


def reason(
    engine: LocalEngine,
    path: Path,
    *,
    count: int,
    seed: int,
    report: Callable[[int, int], None],
) -> list[OwnTrace]:
    """Lets the model think about ``count`` held-out problems, sampling at temperature 1.

    ``path`` gets a line a trace, a batch at a time; a line cut in half by a crash is written again,
    and what is written does not depend on where a run was interrupted.

    Args:
        engine: the model.
        path: of the ``.jsonl`` file.
        count: number of problems.
        seed: which problems, and the draws.
        report: called with done and total.
    """
    done = read_own(path)
    # Whole batches only, so that a resumed run generates in the batches of an undisturbed one.
    kept = len(done) - len(done) % _BATCH if len(done) < count else len(done)
    _rewrite(path, done[:kept])
    traces = done[:kept]
    chosen = own_problems(seed, count)
    for start in range(kept, count, _BATCH):
        report(start, count)
        batch = chosen[start : start + _BATCH]
        generations = engine.generate(
            [problem.prompt for problem in batch],
            max_new_tokens=_MAX_NEW_TOKENS,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
            batch_size=_BATCH,
            first_number=start,
        )
        new = [
            OwnTrace(problem.prompt, problem.answer, g.tokens, g.prompt_length, g.text)
            for problem, g in zip(batch, generations, strict=True)
        ]
        _append(path, new)
        traces += new
    report(count, count)
    return traces


def read_own(path: Path) -> list[OwnTrace]:
    """The whole lines of :func:`reason`'s file."""
    if not path.exists():
        return []
    *lines, _cut = path.read_text(encoding="utf-8").split("\n")
    return [OwnTrace(**json.loads(line)) for line in lines]


def _lines(traces: list[OwnTrace]) -> str:
    return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in traces)


def _rewrite(path: Path, traces: list[OwnTrace]) -> None:
    write_bytes(path, _lines(traces).encode())


def _append(path: Path, traces: list[OwnTrace]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(traces))
        file.flush()
        os.fsync(file.fileno())


def written(
    engine: Engine,
    *,
    held_out: bool,
    seed: int,
    slip_rate: float,
    without: Collection[str] = (),
) -> Iterator[list[int]]:
    """Endless traces with planted slips, as token ids of prompt, thinking and answer.

    Args:
        engine: whose tokenizer and chat template serve.
        held_out: problems that TinyR1 was not trained on, or those it may have been.
        seed: which problems and slips; the i-th trace depends on these and i only.
        slip_rate: probability that a step slips.
        without: prompts to leave out of the held-out ones, which are all different.
    """
    tokenizer = engine.require_tokenizer()
    source = problems(seed + 202, held_out=held_out)
    if held_out:
        source = distinct(source, without)
    for number, problem in enumerate(source):
        rng = random.Random(f"{seed}/demo/{number}")
        text = "".join(piece.text for piece in trace(problem, rng, slip_rate))
        yield [*engine.encode_prompt(problem.prompt), *tokenizer.encode(text), tokenizer.eos_id]


def corpus(
    engine: LocalEngine, own: list[OwnTrace], *, seed: int, slip_rate: float
) -> Iterator[list[int]]:
    """What the SAE is trained on: the model's own traces, then written ones without end."""
    yield from (one.tokens for one in own)
    yield from written(engine, held_out=False, seed=seed, slip_rate=slip_rate)


def held_out_traces(
    engine: LocalEngine, own: list[OwnTrace], *, count: int, seed: int, slip_rate: float
) -> list[list[int]]:
    """Written traces of held-out problems, no two alike, none of which the model was given itself.

    So no problem is in both of the halves that a detector is chosen and measured on. Single steps
    ("9 plus 3") may be.
    """
    seen = {one.prompt for one in own}
    source = written(engine, held_out=True, seed=seed, slip_rate=slip_rate, without=seen)
    return list(islice(source, count))
