"""The model in this process, on one device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from r1sae_fast.r1.blocks import Fp8Mode
from r1sae_fast.r1.chat import Tokenizer
from r1sae_fast.r1.checkpoint import load_model
from r1sae_fast.r1.engines.base import (
    Engine,
    Prompt,
    checkpoint_name,
    fingerprint,
    resolve_checkpoint,
)
from r1sae_fast.r1.fp8_linear import WeightCache
from r1sae_fast.r1.generate import Generation, generate_tokens
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.sampling import Sampling


class LocalEngine(Engine):
    """Runs a DeepSeek-V3/R1 checkpoint with torch: generation, residuals, logits."""

    tokenizer: Tokenizer | None

    def __init__(
        self,
        model: R1Model,
        tokenizer: Tokenizer | None = None,
        *,
        name: str = "unnamed",
        fingerprint: str = "",
    ) -> None:
        """Wraps a model; without a tokenizer, prompts must be token ids.

        ``name`` and ``fingerprint`` are written beside what is harvested.
        """
        self.model = model.eval()
        self.config = model.config
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: Path | str,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        last_layer: int | None = None,
        *,
        fp8: Fp8Mode = "w8a8",
        weight_cache: WeightCache | Literal["auto"] = "auto",
    ) -> LocalEngine:
        """Loads a checkpoint folder with its tokenizer; ``"tiny-r1"`` is the shipped model.

        Args:
            checkpoint: the folder, or ``"tiny-r1"``.
            dtype: of the residual stream and of all weights that are not kept in fp8.
            device: where to.
            last_layer: load no block after this one; then there are residuals up to it, but
                neither logits nor generation.
            fp8: "w8a8" runs a checkpoint in block fp8 as R1 was trained and is served: weights
                stay fp8, the activations they meet are quantised. "dequantize" works in
                ``dtype`` throughout, for parity with tools that do so. Without fp8 in the
                checkpoint there is no difference.
            weight_cache: whether fp8 weights are dequantised "once" or at every "call" where the
                device has no kernels for them; "auto" goes by the memory left.

        Raises:
            FileNotFoundError: no checkpoint or tokenizer there, or a shard is missing.
            CheckpointError: something in the folder is malformed.
            ValueError: no such layer, or an unknown ``fp8`` or ``weight_cache``.
        """
        directory = resolve_checkpoint(checkpoint)
        model = load_model(
            directory,
            dtype=dtype,
            device=device,
            last_layer=last_layer,
            fp8=fp8,
            weight_cache=weight_cache,
        )
        tokenizer = Tokenizer.from_pretrained(directory)
        name = checkpoint_name(checkpoint)
        return cls(model, tokenizer, name=name, fingerprint=fingerprint(directory))

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        """Blocks of the whole model, loaded or not."""
        return self.config.num_hidden_layers

    @property
    def loaded_layers(self) -> int:
        """Blocks that were loaded, from 0."""
        return len(self.model.layers)

    @property
    def has_head(self) -> bool:
        """False where only the blocks up to ``last_layer`` were loaded."""
        return self.model.has_head

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    @property
    def context(self) -> int:
        """Most tokens that a sequence may have."""
        return self.config.max_position_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embed_tokens.weight.device

    @property
    def eos_id(self) -> int:
        """The config's end of sentence."""
        return self.config.eos_token_id

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError where there is none."""
        super().require_tokenizer()
        assert self.tokenizer is not None  # or super() has raised
        return self.tokenizer

    def _encode_nth(self, number: int, prompt: Prompt, prefill: str) -> list[int]:
        try:
            return self.encode_prompt(prompt, prefill)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None

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
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, greedy)
        if isinstance(prompts, (str, Mapping)):
            raise ValueError("prompts is a single prompt, expected a list of prompts")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.check_head()
        encoded = [
            self._encode_nth(number, prompt, prefill)
            for number, prompt in enumerate(prompts, first_number)
        ]
        stops = self.default_stop_ids if stop_ids is None else frozenset(stop_ids)
        results = []
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            first = first_number + start
            written = generate_tokens(
                self.model,
                batch,
                sampling,
                stop_ids=stops,
                context=self.context,
                numbers=range(first, first + len(batch)),
            )
            for prompt_ids, (new, reason) in zip(batch, written, strict=True):
                tokens = prompt_ids + new
                shown = new[:-1] if reason == "stop" else new
                results.append(
                    Generation(
                        tokens=tokens,
                        text="" if self.tokenizer is None else self.tokenizer.decode(shown),
                        prompt_length=len(prompt_ids),
                        finish_reason=reason,
                        segments=self.segments(tokens, len(prompt_ids)),
                    )
                )
        return results

    def _batch(
        self, token_ids: Tensor | Sequence[Sequence[int]], lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        """Checked ids [batch, seq] on the device, and which of them are no padding."""
        if not isinstance(token_ids, Tensor):
            if len({len(row) for row in token_ids}) > 1:
                raise ValueError(
                    "the sequences have unequal lengths; pad them on the right and give lengths="
                )
            token_ids = torch.tensor([list(row) for row in token_ids], dtype=torch.int64)
        if token_ids.ndim != 2 or token_ids.is_floating_point():
            raise ValueError(
                f"token_ids is {token_ids.dtype} {tuple(token_ids.shape)}, "
                "expected integers [batch, seq]"
            )
        token_ids = token_ids.to(self.device, torch.int64)
        batch, seq = token_ids.shape
        if token_ids.numel():
            if seq > self.context:
                raise ValueError(
                    f"the sequences have {seq} tokens, the model's context is {self.context}"
                )
            self.check_ids([int(token_ids.min()), int(token_ids.max())])
        if lengths is None:
            return token_ids, torch.ones_like(token_ids, dtype=torch.bool)
        lengths = torch.as_tensor(lengths, device=self.device)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths has the shape {tuple(lengths.shape)}, expected ({batch},)")
        if batch and not bool(((lengths >= 0) & (lengths <= seq)).all()):
            raise ValueError(f"lengths must lie between 0 and {seq}, the width of token_ids")
        return token_ids, torch.arange(seq, device=self.device) < lengths[:, None]

    @torch.no_grad()
    def residuals(
        self,
        token_ids: Tensor | Sequence[Sequence[int]],
        layer: int,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The residual stream after block ``layer``, in one pass; later blocks are not run.

        The hook point is ``model.layers.{layer}`` (its output), layers counted from 0; in
        transformers' terms, ``hidden_states[layer + 1]``.

        Args:
            token_ids: integers [batch, seq], padded on the right where they are unequal.
            layer: 0 to the number of layers - 1.
            lengths: [batch], tokens of each sequence that are no padding.

        Returns:
            [batch, seq, hidden] in the engine's dtype; zeros at padding.

        Raises:
            ValueError: no such layer, sequences longer than the context, ids outside the
                vocabulary, or shapes that do not fit.
        """
        self.check_layer(layer)
        token_ids, present = self._batch(token_ids, lengths)
        if token_ids.numel() == 0:
            return torch.zeros(
                *token_ids.shape,
                self.config.hidden_size,
                dtype=self.model.dtype,
                device=self.device,
            )
        residual = self.model.residual(torch.where(present, token_ids, 0), layer)
        return residual.masked_fill_(~present[..., None], 0)

    @torch.no_grad()
    def logits(
        self,
        token_ids: Tensor | Sequence[Sequence[int]],
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of the next token, float32 [batch, seq, vocab]; zeros at padding.

        Arguments and errors as for :meth:`residuals`.
        """
        self.check_head()
        last = self.config.num_hidden_layers - 1
        residual = self.residuals(token_ids, last, lengths)
        logits: Tensor = self.model.lm_head(self.model.norm(residual))
        return logits.float()
