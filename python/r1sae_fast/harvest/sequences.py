"""Prompts and given texts as the token sequences that are harvested."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from r1sae_fast.prompts import Item
from r1sae_fast.r1.chat import THINK
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.r1.segments import Segment

Mode = Literal["generate", "prefill"]
MODES = ("generate", "prefill")


@dataclass(frozen=True)
class HarvestSequence:
    """A finished sequence, the :class:`Segment` of each token, and the prompt it is from."""

    item: Item
    tokens: list[int]
    segments: list[int]


def plain(item: Any) -> Item:
    """The prompt in types that JSON knows: token ids may come as an array or a tensor."""
    if isinstance(item, str):
        return item
    return item.tolist() if hasattr(item, "tolist") else list(item)


def item_bytes(item: Item) -> bytes:
    """What a prompt adds to the checksum over all prompts."""
    return json.dumps(item, ensure_ascii=False).encode() + b"\n"


def take_pass(
    engine: Engine,
    source: Iterator[Item],
    mode: Mode,
    sampling: Sampling,
    *,
    first: int,
    batch_size: int,
    rows: int | None,
) -> list[HarvestSequence]:
    """The next sequences: whole batches of prompts until the engine's ``pass_tokens`` are
    reached, or ``rows`` rows, or the prompts end; ``first`` is the number of the first prompt."""
    taken: list[HarvestSequence] = []
    total = 0
    while True:
        batch = list(itertools.islice(source, batch_size))
        sequences = _run(engine, batch, mode, sampling, first + len(taken)) if batch else []
        sequences = _within(sequences, None if rows is None else rows - total)
        taken += sequences
        total += sum(len(sequence.tokens) for sequence in sequences)
        enough = total >= engine.pass_tokens or (rows is not None and total >= rows)
        if not batch or enough:
            return taken


def _run(
    engine: Engine, batch: Sequence[Item], mode: Mode, sampling: Sampling, first: int
) -> list[HarvestSequence]:
    """The batch's finished sequences."""
    if mode == "prefill":
        return [read_given(engine, item, first + place) for place, item in enumerate(batch)]
    for place, item in enumerate(batch):
        if _answer(item) is not None:
            raise ValueError(
                f"prompt {first + place} has a response already; harvest it in mode 'prefill'"
            )
    generations = engine.generate(
        batch,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        greedy=sampling.greedy,
        batch_size=len(batch),
        first_number=first,
    )
    return [
        HarvestSequence(item, g.tokens, g.segments)
        for item, g in zip(batch, generations, strict=True)
    ]


def _answer(item: Item) -> str | None:
    """The last message of a conversation, if it is the assistant's."""
    last = item[-1] if item else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        return last.get("content", "")
    return None


def read_given(engine: Engine, item: Item, number: int) -> HarvestSequence:
    """A given text, conversation or token ids as a sequence."""
    try:
        tokens, segments = _encode_given(engine, item)
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from None
    return HarvestSequence(item, tokens, segments)


def _encode_given(engine: Engine, item: Item) -> tuple[list[int], list[int]]:
    if isinstance(item, str):
        ids = engine.encode_text(item)
        return ids, engine.segments(ids)
    answer = _answer(item)
    if answer is None:
        ids = engine.encode_prompt(item)
        conversation = isinstance(item[0], dict)
        return ids, engine.segments(ids, len(ids) if conversation else None)
    tokenizer = engine.require_tokenizer()
    prompt = engine.encode_prompt(item[:-1])
    if engine.segments(prompt, len(prompt))[-1] == Segment.THINKING:
        # The template has opened <think> already.
        answer = answer.removeprefix(THINK).removeprefix("\n")
    ids = engine.encode_prompt([*prompt, *tokenizer.encode(answer), tokenizer.eos_id])
    return ids, engine.segments(ids, len(prompt))


def _within(sequences: list[HarvestSequence], rows: int | None) -> list[HarvestSequence]:
    """As many of the sequences as it takes to reach ``rows`` rows."""
    if rows is None:
        return sequences
    total = itertools.accumulate(len(sequence.tokens) for sequence in sequences)
    enough = next((place for place, sum_ in enumerate(total, 1) if sum_ >= rows), len(sequences))
    return sequences[:enough]
