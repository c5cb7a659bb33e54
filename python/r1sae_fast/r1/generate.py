"""Generation on token ids: prefill, then one step a token on the latent cache."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from r1sae_fast.r1.cache import LatentCache
from r1sae_fast.r1.model import ModelTaps, R1Model
from r1sae_fast.r1.sampling import Sampler, Sampling
from r1sae_fast.r1.shapes import padded

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Generation:
    """A finished sequence.

    Attributes:
        tokens: ids of the whole sequence, prompt first, the stop token included.
        text: what the model wrote, without the prompt and without the stop token.
        prompt_length: number of tokens that the model did not write.
        finish_reason: ``"stop"`` at a stop token, ``"length"`` at a limit, ``"interrupted"``
            in :class:`GenerationInterrupted` where neither was reached.
        segments: of each token, see :mod:`r1sae_fast.r1.segments`.
    """

    tokens: list[int]
    text: str
    prompt_length: int
    finish_reason: FinishReason
    segments: list[int]


class GenerationInterrupted(KeyboardInterrupt):
    """ctrl-c during a generation; ``generations`` has what was written until then, one entry a
    prompt (those not begun have no new tokens)."""

    def __init__(self, generations: list[Generation]) -> None:
        super().__init__("the generation was interrupted")
        self.generations = generations


class Written(NamedTuple):
    """A token that a sequence was continued by.

    Attributes:
        row: place of the sequence in its batch.
        token: the id.
        reason: why the sequence ends here, None where it goes on.
    """

    row: int
    token: int
    reason: FinishReason | None


class GenerationTaps(ModelTaps, Protocol):
    """Taps that are told which tokens each forward is about to read."""

    def begin(
        self,
        rows: Sequence[int],
        first: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        width: int | None = None,
    ) -> None:
        """Announces a forward.

        Args:
            rows: place in the batch of prompts of each sequence in it.
            first: position of each one's first new token.
            tokens: each one's new tokens; padding follows where others have more. A sequence that
                is finished and only rides along has none.
            width: columns of the tensors, if not the largest number of tokens.
        """


def pad_right(
    sequences: Sequence[Sequence[int]], device: torch.device, width: int | None = None
) -> torch.Tensor:
    """Ids int64 [sequences, width], filled up with id 0; ``width``: default the longest's."""
    width = max(map(len, sequences)) if width is None else width
    rows = [list(sequence) + [0] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device)


@torch.no_grad()
def generate_steps(
    model: R1Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    context: int,
    numbers: Sequence[int],
    taps: GenerationTaps | None = None,
) -> Generator[list[Written], None, None]:
    """Continues one batch of prompts, none of them empty or longer than ``context``.

    Args:
        model: with a head.
        prompts: token ids. One that fills the context is not continued at all.
        sampling: the settings.
        stop_ids: a sequence ends with the first of these that it writes.
        context: a sequence ends when it has so many tokens.
        numbers: of the sequences; they choose the random streams.
        taps: read and write inside every forward.

    Yields:
        After each step, the next token of every sequence that has not ended.
    """
    counts = [0] * len(prompts)
    limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
    done = [limit <= 0 for limit in limits]
    batch = [row for row in range(len(prompts)) if not done[row]]
    if not batch:
        return

    device = model.embed_tokens.weight.device
    longest = max(len(prompts[row]) for row in batch)
    width = padded(longest, model.dtype, device, context)
    tokens = pad_right([prompts[row] for row in batch], device, width)
    lengths = torch.tensor([len(prompts[row]) for row in batch], device=device)
    sampler = Sampler(sampling, [numbers[row] for row in batch])
    cache = LatentCache(
        model.config,
        lengths,
        layers=len(model.layers),
        capacity=tokens.shape[1] + min(sampling.max_new_tokens, 128),
        dtype=model.dtype,
    )
    if taps is not None:
        taps.begin(batch, [0] * len(batch), [prompts[row] for row in batch], width=width)
    residual = model.residual(tokens, cache=cache, taps=taps)
    last = residual[torch.arange(len(batch), device=device), lengths - 1]
    while True:
        # Float32 from here on: in bf16 many logits of a large vocabulary tie.
        chosen = sampler(model.lm_head(model.norm(last)).float())
        ids: list[int] = chosen.tolist()
        step = []
        for row, token in zip(batch, ids, strict=True):
            if not done[row]:
                counts[row] += 1
                reason: FinishReason | None = None
                if token in stop_ids:
                    reason = "stop"
                elif counts[row] == limits[row]:
                    reason = "length"
                done[row] = reason is not None
                step.append(Written(row, token, reason))
        yield step
        places = [place for place, row in enumerate(batch) if not done[row]]
        if not places:
            return
        # Dropping rows copies the cache, so finished ones ride along until they are many.
        if len(places) <= 0.75 * len(batch):
            batch, ids = [batch[place] for place in places], [ids[place] for place in places]
            kept = torch.tensor(places, device=device)
            sampler.keep(places)
            cache.keep(kept)
            chosen = chosen[kept]
        if taps is not None:
            new = [[] if done[row] else [token] for row, token in zip(batch, ids, strict=True)]
            taps.begin(batch, [len(prompts[row]) + counts[row] - 1 for row in batch], new)
        last = model.step(chosen[:, None], cache, taps)[:, 0]
