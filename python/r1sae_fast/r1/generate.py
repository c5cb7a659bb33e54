"""Generation on token ids: prefill, then one step a token on the latent cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from r1sae_fast.r1.cache import LatentCache
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.sampling import Sampler, Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """A finished sequence.

    Attributes:
        tokens: ids of the whole sequence, prompt first, the stop token included.
        text: what the model wrote, without the prompt and without the stop token.
        prompt_length: number of tokens that the model did not write.
        finish_reason: ``"stop"`` at a stop token, ``"length"`` at a limit.
        segments: of each token, see :mod:`r1sae_fast.r1.segments`.
    """

    tokens: list[int]
    text: str
    prompt_length: int
    finish_reason: FinishReason
    segments: list[int]


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Ids int64 [sequences, longest], filled up with id 0."""
    longest = max(map(len, sequences))
    rows = [list(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device)


@torch.no_grad()
def generate_tokens(
    model: R1Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    context: int,
    numbers: Sequence[int],
) -> list[tuple[list[int], FinishReason]]:
    """Continues one batch of prompts, none of them empty or longer than ``context``.

    Args:
        model: with a head.
        prompts: token ids.
        sampling: the settings.
        stop_ids: a sequence ends with the first of these that it writes.
        context: a sequence ends when it has so many tokens.
        numbers: of the sequences; they choose the random streams.

    Returns:
        For each prompt the new token ids and why they end.
    """
    written: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
    # A prompt that fills the context is finished before it starts.
    batch = [row for row, limit in enumerate(limits) if limit > 0]
    if not batch:
        return list(zip(written, reasons, strict=True))

    device = model.embed_tokens.weight.device
    tokens = pad_right([prompts[row] for row in batch], device)
    lengths = torch.tensor([len(prompts[row]) for row in batch], device=device)
    sampler = Sampler(sampling, [numbers[row] for row in batch])
    cache = LatentCache(
        model.config,
        lengths,
        layers=len(model.layers),
        capacity=tokens.shape[1] + min(sampling.max_new_tokens, 128),
        dtype=model.dtype,
    )
    residual = model.residual(tokens, cache=cache)
    last = residual[torch.arange(len(batch), device=device), lengths - 1]
    done = [limit == 0 for limit in limits]
    while True:
        # Float32 from here on: in bf16 many logits of a large vocabulary tie.
        chosen = sampler(model.lm_head(model.norm(last)).float())
        for row, token in zip(batch, chosen.tolist(), strict=True):
            if done[row]:
                continue
            written[row].append(token)
            if token in stop_ids:
                reasons[row] = "stop"
            done[row] = token in stop_ids or len(written[row]) == limits[row]
        places = [place for place, row in enumerate(batch) if not done[row]]
        if not places:
            return list(zip(written, reasons, strict=True))
        # Dropping rows copies the cache, so finished ones ride along until they are many.
        if len(places) <= 0.75 * len(batch):
            batch = [batch[place] for place in places]
            kept = torch.tensor(places, device=device)
            sampler.keep(places)
            cache.keep(kept)
            chosen = chosen[kept]
        last = model.step(chosen[:, None], cache)[:, 0]
