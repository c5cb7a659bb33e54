"""The model in this process, on one device."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from r1sae_fast.r1.chat import Messages, Tokenizer
from r1sae_fast.r1.checkpoint import load_model
from r1sae_fast.r1.generate import Generation, generate_tokens
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.r1.segments import segments
from r1sae_fast.r1.weights import INDEX_NAME, SINGLE_NAME

TINY_R1 = "tiny-r1"
Prompt = str | Messages | Sequence[int]
"""A question in plain text (one user message), a conversation, or token ids."""


def resolve_checkpoint(name: Path | str) -> Path:
    """The folder of a checkpoint: the shipped one for ``"tiny-r1"``, else the path itself."""
    if str(name) == TINY_R1:
        from r1sae_fast import tiny_r1

        return Path(tiny_r1.path())
    return Path(name)


def fingerprint(directory: Path) -> str:
    """16 hex digits that tell checkpoints apart without reading all of R1's 641 GiB.

    Hashes config, tokenizer, index, and of every shard its name, size and first and last 64 KiB.
    """
    digest = hashlib.sha256()
    for name in ("config.json", INDEX_NAME, "tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for shard in sorted((*directory.glob("model-*.safetensors"), directory / SINGLE_NAME)):
        if shard.is_file():
            size = shard.stat().st_size
            digest.update(f"{shard.name} {size}".encode())
            with shard.open("rb") as file:
                digest.update(file.read(2**16))
                file.seek(max(size - 2**16, 0))
                digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


class LocalEngine:
    """Runs a DeepSeek-V3/R1 checkpoint with torch: generation, residuals, logits."""

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
    ) -> LocalEngine:
        """Loads a checkpoint folder with its tokenizer; ``"tiny-r1"`` is the shipped model.

        Args:
            checkpoint: the folder, or ``"tiny-r1"``.
            dtype: the weights are dequantised to this, and all work is done in it.
            device: where to.
            last_layer: load no block after this one; then there are residuals up to it, but
                neither logits nor generation.

        Raises:
            FileNotFoundError: no checkpoint or tokenizer there, or a shard is missing.
            CheckpointError: something in the folder is malformed.
            ValueError: no such layer.
        """
        directory = resolve_checkpoint(checkpoint)
        model = load_model(directory, dtype=dtype, device=device, last_layer=last_layer)
        tokenizer = Tokenizer.from_pretrained(directory)
        name = TINY_R1 if str(checkpoint) == TINY_R1 else directory.resolve().name
        return cls(model, tokenizer, name=name, fingerprint=fingerprint(directory))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embed_tokens.weight.device

    @property
    def context(self) -> int:
        """Most tokens that a sequence may have."""
        return self.config.max_position_embeddings

    @property
    def default_stop_ids(self) -> frozenset[int]:
        """The end of sentence."""
        tokenizer = self.tokenizer
        return frozenset({self.config.eos_token_id if tokenizer is None else tokenizer.eos_id})

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer; give token ids instead of text")
        return self.tokenizer

    def encode_prompt(self, prompt: Prompt, prefill: str = "") -> list[int]:
        """Token ids of a prompt.

        Text and conversations go through the chat template, which opens ``<think>``; token ids
        are taken as they are. ``prefill`` is appended as the beginning of the model's answer.

        Raises:
            ValueError: the prompt is empty, longer than the context, or holds an id outside the
                vocabulary.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty")
            ids = self.require_tokenizer().apply_chat_template(
                [{"role": "user", "content": prompt}]
            )
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.require_tokenizer().apply_chat_template(prompt)  # type: ignore[arg-type]  # messages
        else:
            ids = [operator.index(token) for token in prompt]  # type: ignore[arg-type]  # token ids
        if prefill:
            ids = ids + self.require_tokenizer().encode(prefill)
        if not ids:
            raise ValueError("the prompt is empty: a sequence needs at least one token")
        self._check_ids(ids)
        return ids

    def _encode_nth(self, number: int, prompt: Prompt, prefill: str) -> list[int]:
        try:
            return self.encode_prompt(prompt, prefill)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) > self.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the model's context is {self.context}; "
                "shorten the prompt"
            )
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary "
                f"(0 to {self.config.vocab_size - 1})"
            )

    def segments(self, tokens: Sequence[int], prompt_length: int | None = None) -> list[int]:
        """Prompt, thinking or response, of each token: :func:`r1sae_fast.r1.segments.segments`."""
        tokenizer = self.tokenizer
        return segments(
            tokens,
            think_id=None if tokenizer is None else tokenizer.think_id,
            end_think_id=None if tokenizer is None else tokenizer.end_think_id,
            prompt_length=prompt_length,
        )

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
            self._check_ids([int(token_ids.min()), int(token_ids.max())])
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

    def check_layer(self, layer: int) -> None:
        """Raises ValueError if there is no such layer or it was not loaded."""
        count, loaded = self.config.num_hidden_layers, len(self.model.layers)
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise ValueError(f"layer {layer} does not exist: the model has 0 to {count - 1}")
        if layer >= loaded:
            raise ValueError(
                f"layer {layer} was not loaded (last_layer was {loaded - 1}); load the engine again"
            )

    def check_head(self) -> None:
        """Raises ValueError if the engine was loaded without the later layers and the head."""
        if not self.model.has_head:
            raise ValueError(
                f"the engine was loaded up to layer {len(self.model.layers) - 1} only, which "
                "gives residuals but no text; load it without last_layer"
            )

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
