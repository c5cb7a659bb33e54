"""Generation and streaming, for engines that tell the steps."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

from r1sae_fast.r1.engines.base import Engine, Prompt
from r1sae_fast.r1.engines.pieces import Pieces
from r1sae_fast.r1.generate import (
    FinishReason,
    Generation,
    GenerationInterrupted,
    Written,
)
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.r1.taps import Tap
from r1sae_fast.r1.taps.run import TapRun


class StreamedToken(NamedTuple):
    """A token as it is written.

    Attributes:
        sequence: number of the prompt (``first_number`` and up).
        token: its id.
        text: what it adds to the text: nothing while a character is unfinished or at the stop
            token, so that a sequence's pieces together are its :attr:`Generation.text`.
        finish_reason: of the sequence, with its last token; None before.
    """

    sequence: int
    token: int
    text: str
    finish_reason: FinishReason | None


class GeneratingEngine(Engine):
    """An engine that continues prompts, a batch at a time."""

    @abstractmethod
    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stop_ids: Collection[int],
        numbers: Sequence[int],
        taps: TapRun | None,
    ) -> Generator[list[Written], None, None]:
        """One batch's generation: :func:`r1sae_fast.r1.generate.generate_steps`."""

    @abstractmethod
    def _tap_run(
        self,
        taps: Sequence[Tap],
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None,
        new: int | None,
    ) -> TapRun | None:
        """The taps prepared for a call; None where there are none."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 1024,
        temperature: float = 0.6,
        top_p: float = 0.95,
        seed: int = 0,
        *,
        greedy: bool = False,
        stop_ids: Collection[int] | None = None,
        prefill: str = "",
        batch_size: int = 64,
        first_number: int = 0,
    ) -> list[Generation]:
        """Continues each prompt until a stop token, ``max_new_tokens`` or the end of the context.

        The draws of prompt ``i`` depend on ``(seed, first_number + i)`` alone, not on the prompts
        beside it.

        Args:
            prompts: questions, conversations or token ids, mixed as you like.
            max_new_tokens: at most so many tokens each.
            temperature: 0 is greedy.
            top_p: nucleus.
            seed: of the draws.
            greedy: take the likeliest token always.
            stop_ids: default: the end of sentence. The stop token is kept in ``tokens``.
            prefill: text that every answer begins with, after the template's ``<think>``.
            batch_size: prompts that run together.
            first_number: of the first prompt, where ``prompts`` is a part of a longer list.

        Raises:
            ValueError: an empty or too long prompt, or a setting out of its range.
            GenerationInterrupted: on ctrl-c, with what was written until then; it is a
                KeyboardInterrupt.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, greedy)
        encoded = self._encode_all(prompts, prefill, batch_size, first_number)
        new: list[list[int]] = [[] for _ in encoded]
        # A prompt that fills the context is finished before it starts.
        reasons: list[FinishReason] = [
            "length" if len(prompt) >= self.context else "interrupted" for prompt in encoded
        ]
        try:
            for start, step in self._all_steps(
                encoded, sampling, stop_ids, batch_size, first_number
            ):
                for row, token, reason in step:
                    new[start + row].append(token)
                    reasons[start + row] = reason or "interrupted"
        except KeyboardInterrupt:
            raise GenerationInterrupted(self._generations(encoded, new, reasons)) from None
        return self._generations(encoded, new, reasons)

    def stream(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 1024,
        temperature: float = 0.6,
        top_p: float = 0.95,
        seed: int = 0,
        *,
        greedy: bool = False,
        stop_ids: Collection[int] | None = None,
        prefill: str = "",
        batch_size: int = 64,
        first_number: int = 0,
    ) -> Iterator[StreamedToken]:
        """:meth:`generate` a token at a time, as they are written: the same tokens, and pieces
        that add up to the same texts. Sequences of a batch take turns.

        Closing the iterator, or ctrl-c, stops the generation at once. A prompt that fills the
        context has no tokens. Arguments and errors as for :meth:`generate`.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, greedy)
        encoded = self._encode_all(prompts, prefill, batch_size, first_number)
        return self._stream(encoded, sampling, stop_ids, batch_size, first_number)

    def _stream(
        self,
        encoded: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: Collection[int] | None,
        batch_size: int,
        first_number: int,
    ) -> Iterator[StreamedToken]:
        tokenizer = self.tokenizer
        pieces = [Pieces(tokenizer.decode) if tokenizer else None for _ in encoded]
        steps = self._all_steps(encoded, sampling, stop_ids, batch_size, first_number)
        with contextlib.closing(steps):
            for start, step in steps:
                for row, token, reason in step:
                    text, writer = "", pieces[start + row]
                    if writer is not None:
                        ended = reason == "stop"
                        text = writer.end() if ended else writer.add(token, last=reason is not None)
                    yield StreamedToken(first_number + start + row, token, text, reason)

    def _all_steps(
        self,
        encoded: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: Collection[int] | None,
        batch_size: int,
        first_number: int,
    ) -> Generator[tuple[int, list[Written]], None, None]:
        """The steps of one batch after another, each with the place of the batch's first
        prompt."""
        stops = self.default_stop_ids if stop_ids is None else frozenset(stop_ids)
        run = self._tap_run(
            (), encoded, [len(prompt) for prompt in encoded], sampling.max_new_tokens
        )
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            first = first_number + start
            if run is not None:
                run.first = start
            steps = self._steps(
                batch,
                sampling,
                stop_ids=stops,
                numbers=range(first, first + len(batch)),
                taps=run,
            )
            with contextlib.closing(steps):
                for step in steps:
                    yield start, step
        if run is not None:
            run.finish()

    def _encode_all(
        self, prompts: Sequence[Prompt], prefill: str, batch_size: int, first_number: int
    ) -> list[list[int]]:
        if isinstance(prompts, (str, Mapping)):
            raise ValueError("prompts is a single prompt, expected a list of prompts")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.check_head()
        return [
            self._encode_nth(number, prompt, prefill)
            for number, prompt in enumerate(prompts, first_number)
        ]

    def _encode_nth(self, number: int, prompt: Prompt, prefill: str) -> list[int]:
        try:
            return self.encode_prompt(prompt, prefill)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None

    def _generations(
        self,
        encoded: Sequence[list[int]],
        written: Sequence[list[int]],
        reasons: Sequence[FinishReason],
    ) -> list[Generation]:
        generations = []
        for prompt, new, reason in zip(encoded, written, reasons, strict=True):
            tokens = prompt + new
            shown = new[:-1] if reason == "stop" else new
            generations.append(
                Generation(
                    tokens=tokens,
                    text="" if self.tokenizer is None else self.tokenizer.decode(shown),
                    prompt_length=len(prompt),
                    finish_reason=reason,
                    segments=self.segments(tokens, len(prompt)),
                )
            )
        return generations
