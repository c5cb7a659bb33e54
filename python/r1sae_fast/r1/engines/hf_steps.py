"""transformers' ``generate`` as an iterator of steps, with our sampling and our taps."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from r1sae_fast.r1.engines.hf_hooks import hooked
from r1sae_fast.r1.generate import FinishReason, Written
from r1sae_fast.r1.sampling import Sampler, Sampling
from r1sae_fast.r1.taps.run import TapRun


@dataclass
class _Batch:
    """What generate calls back, in the thread that it runs in: sampling, then bookkeeping.

    Attributes:
        rows: places of the prompts in the batch that was asked for.
        prompts: their ids.
        sampler: for all of them, to the end; finished ones draw in vain.
        limits: most tokens to be written to each.
        stop_ids: end a sequence.
        taps: told of every forward.
        counts, done: of each, so far.
        last: the newest tokens; empty before the first.
        steps: to the thread that reads; an exception, or None at the end.
        stopped: set where no more is read.
    """

    rows: list[int]
    prompts: list[Sequence[int]]
    sampler: Sampler
    limits: list[int]
    stop_ids: Collection[int]
    taps: TapRun | None
    counts: list[int]
    done: list[bool]
    last: list[int] = field(default_factory=list)
    # One step ahead of its reader, not more.
    steps: queue.Queue[list[Written] | BaseException | None] = field(
        default_factory=lambda: queue.Queue(1)
    )
    stopped: threading.Event = field(default_factory=threading.Event)

    def before_forward(self, _module: nn.Module, _args: Any) -> None:
        """Tells the taps which tokens come."""
        if self.taps is None:
            return
        if not self.last:
            self.taps.begin(self.rows, [0] * len(self.rows), self.prompts, left=True)
            return
        first = [len(prompt) + n - 1 for prompt, n in zip(self.prompts, self.counts, strict=True)]
        new = [[] if done else [t] for t, done in zip(self.last, self.done, strict=True)]
        self.taps.begin(self.rows, first, new, width=1)

    def process_logits(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draws as every engine does; what was drawn is all that a greedy choice then sees."""
        chosen = self.sampler(scores.float())
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, chosen[:, None], 0.0)

    def after_step(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Counts the new tokens and hands them over; says which sequences are done."""
        self.last = input_ids[:, -1].tolist()
        step = []
        for place, token in enumerate(self.last):
            if self.done[place]:
                continue
            self.counts[place] += 1
            reason: FinishReason | None = None
            if token in self.stop_ids:
                reason = "stop"
            elif self.counts[place] == self.limits[place]:
                reason = "length"
            self.done[place] = reason is not None
            step.append(Written(self.rows[place], token, reason))
        if not self.stopped.is_set():
            self.steps.put(step)
        done = [True] * len(self.done) if self.stopped.is_set() else self.done
        return torch.tensor(done, device=input_ids.device)

    def __iter__(self) -> Iterator[list[Written]]:
        """The steps, as they come; raises what was raised in the other thread."""
        while (step := self.steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step

    def stop(self, thread: threading.Thread) -> None:
        """Lets the step under way be the last, and waits for it."""
        self.stopped.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.steps.get(timeout=0.02)
        thread.join()


def hf_steps(
    model: Any,
    decoder: nn.Module,
    blocks: nn.ModuleList,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    context: int,
    numbers: Sequence[int],
    taps: TapRun | None,
) -> Generator[list[Written], None, None]:
    """As :func:`r1sae_fast.r1.generate.generate_steps`, by ``model.generate``.

    ``generate`` calls back while an iterator is asked, so it runs in a thread of its own. Leaving
    the iterator stops it after the step under way.
    """
    limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
    rows = [row for row, limit in enumerate(limits) if limit > 0]
    if not rows:
        return
    batch = _Batch(
        rows,
        [prompts[row] for row in rows],
        Sampler(sampling, [numbers[row] for row in rows]),
        [limits[row] for row in rows],
        stop_ids,
        taps,
        [0] * len(rows),
        [False] * len(rows),
    )

    def work() -> None:
        end: BaseException | None = None
        try:
            with (
                _settings(model, max(batch.limits)),
                hooked(blocks, taps),
                _removed(decoder.register_forward_pre_hook(batch.before_forward)),
            ):
                ids, mask = _left_padded(batch.prompts, model.device)
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    logits_processor=[batch.process_logits],
                    stopping_criteria=[batch.after_step],
                )
        except BaseException as error:  # noqa: BLE001  # raised again where steps are read
            end = error
        batch.steps.put(end)

    thread = threading.Thread(target=work, name="r1sae-generate", daemon=True)
    thread.start()
    try:
        yield from batch
    finally:
        batch.stop(thread)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [batch, longest], and 1 where they are no padding."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(seen, device=device)


@contextlib.contextmanager
def _settings(model: Any, new: int) -> Iterator[None]:
    """Settings that leave every choice to the callbacks, whatever the checkpoint recommends (a
    repetition penalty, say): generate fills those it is not given from the model's own."""
    from transformers import GenerationConfig

    before = model.generation_config
    # Sequences end by the callbacks alone, so there are no stop ids here.
    settings = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    model.generation_config = GenerationConfig(**settings)  # type: ignore[no-untyped-call]  # theirs
    try:
        yield
    finally:
        model.generation_config = before


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
