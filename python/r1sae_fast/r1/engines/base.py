"""What every engine is: a model that turns prompts into token ids and token ids into residuals.

Harvesting needs no more than this class. An engine in mode "prefill" must give
:meth:`Engine.rows`; one that can also answer prompts has :meth:`Engine.generate`.
"""

from __future__ import annotations

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from r1sae_fast.r1.chat import Messages
from r1sae_fast.r1.fp8_linear import fp8_kernels
from r1sae_fast.r1.generate import Generation, pad_right
from r1sae_fast.r1.segments import segments
from r1sae_fast.r1.shapes import padded
from r1sae_fast.r1.weights import INDEX_NAME, SINGLE_NAME

TINY_R1 = "tiny-r1"
Prompt = str | Messages | Sequence[int]
"""A question in plain text (one user message), a conversation, or token ids."""


class TextTokenizer(Protocol):
    """What an engine needs of a tokenizer; :class:`r1sae_fast.r1.chat.Tokenizer` is R1's."""

    @property
    def bos_id(self) -> int | None:
        """Put in front of a raw text; None where the model has no such token."""

    @property
    def eos_id(self) -> int:
        """Ends an answer."""

    @property
    def think_id(self) -> int | None:
        """Of ``<think>``."""

    @property
    def end_think_id(self) -> int | None:
        """Of ``</think>``."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing put in front."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens spelled out."""

    def apply_chat_template(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation, up to where the model is to answer."""


def resolve_checkpoint(name: Path | str) -> Path:
    """The folder of a checkpoint: the shipped one for ``"tiny-r1"``, else the path itself."""
    if str(name) == TINY_R1:
        from r1sae_fast import tiny_r1

        return Path(tiny_r1.path())
    return Path(name)


def checkpoint_name(checkpoint: Path | str) -> str:
    """What a checkpoint is called beside what is harvested."""
    return TINY_R1 if str(checkpoint) == TINY_R1 else Path(checkpoint).resolve().name


def describe_fp8(fp8: str, device: torch.device) -> dict[str, Any]:
    """How a checkpoint in fp8 is computed with, for :meth:`Engine.describe`: whether by kernels,
    too, whose sums differ from those of dequantised weights."""
    kernels = fp8 == "w8a8" and fp8_kernels(device) is not None
    return {"fp8": fp8, **({"fp8_kernels": True} if kernels else {})}


def fingerprint(directory: Path) -> str:
    """16 hex digits that tell checkpoints apart without reading all of R1's 641 GiB.

    Hashes config, tokenizer, index, and of every shard its name, size and first and last 64 KiB.
    """
    digest = hashlib.sha256()
    for name in ("config.json", INDEX_NAME, "tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    named = {*directory.glob("model-*.safetensors"), directory / SINGLE_NAME}
    others = {*directory.glob("*.safetensors"), *directory.glob("*.bin")} - named
    for shard in (*sorted(named), *sorted(others)):
        if shard.is_file():
            size = shard.stat().st_size
            digest.update(f"{shard.name} {size}".encode())
            with shard.open("rb") as file:
                digest.update(file.read(2**16))
                file.seek(max(size - 2**16, 0))
                digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


class Engine(ABC):
    """A model and its tokenizer.

    Attributes:
        name, fingerprint: of the checkpoint; written beside what is harvested.
        tokenizer: None where prompts can be token ids only.
        pass_tokens: harvesting gives :meth:`rows` as many batches of sequences at a time as it
            takes to reach this number of tokens; 0 is one batch. A streaming engine, which reads
            the weights once a call, asks for many.
    """

    name: str
    fingerprint: str
    tokenizer: TextTokenizer | None
    pass_tokens: int = 0

    # -- the model, to be told by each engine -------------------------------------------------

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width of the residual stream (d_in of its SAEs)."""

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Blocks of the whole model, loaded or not."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are smaller than this."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Most tokens that a sequence may have."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where :meth:`rows` come out."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """Ends an answer where there is no tokenizer to say so."""

    @property
    def loaded_layers(self) -> int:
        """Blocks 0 to this, excluded, can be run."""
        return self.num_layers

    @property
    def has_head(self) -> bool:
        """Whether there are logits, and so text."""
        return True

    def describe(self) -> dict[str, Any]:
        """All but the checkpoint, the layer and the batches that decides what the residuals are,
        as JSON values: kept beside what is harvested; a resumed run must share it."""
        return {"engine_dtype": str(self.dtype).removeprefix("torch.")}

    @abstractmethod
    def residuals(
        self,
        token_ids: Tensor | Sequence[Sequence[int]],
        layer: int,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The residual stream after block ``layer``: [batch, seq, hidden], zeros at padding."""

    def rows(
        self,
        sequences: Sequence[Sequence[int]],
        layer: int,
        *,
        batch_size: int,
        skip: int = 0,
    ) -> Iterator[tuple[int, Tensor]]:
        """The residuals of finished sequences, without padding, in order.

        Args:
            sequences: token ids, checked by :meth:`encode_prompt`, none empty.
            layer: hook point ``model.layers.{layer}``.
            batch_size: sequences that go through a block together, counted from the first one:
                what is batched with what decides the last bits of the residuals.
            skip: leave out so many sequences at the beginning, a multiple of ``batch_size``,
                which a stopped run has written. The others' rows do not depend on it.

        Yields:
            How many sequences come next (a multiple of ``batch_size``, but for the last), and
            their rows [tokens, hidden] on :attr:`device`. What was yielded may be written and
            the run stopped before the next.
        """
        for start in range(skip, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            tokens = pad_right(batch, self.device, self.width_of(batch))
            lengths = torch.tensor([len(sequence) for sequence in batch], device=self.device)
            residuals = self.residuals(tokens, layer, lengths)
            present = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]
            yield len(batch), residuals[present]

    def width_of(self, batch: Sequence[Sequence[int]]) -> int:
        """To which sequences that run together are padded: at least the longest."""
        return padded(max(map(len, batch)), self.dtype, self.device, self.context)

    def committed(self) -> None:
        """Called when all rows of the last :meth:`rows` are safely on disk: whatever was kept to
        resume it can go."""
        return

    def finished(self, folder: Path) -> None:
        """Called when a harvest to ``folder`` is at its end: what an earlier run of it left there
        to go on from can go, too."""
        return

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
        """Continues each prompt; see :meth:`r1sae_fast.r1.LocalEngine.generate`.

        Raises:
            ValueError: this engine cannot.
        """
        raise ValueError(
            f"{type(self).__name__} reads texts but does not generate; use mode 'prefill', "
            "or another engine"
        )

    # -- checks -------------------------------------------------------------------------------

    def check_layer(self, layer: int) -> None:
        """Raises ValueError if there is no such layer or it was not loaded."""
        count, loaded = self.num_layers, self.loaded_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise ValueError(f"layer {layer} does not exist: the model has 0 to {count - 1}")
        if layer >= loaded:
            raise ValueError(
                f"layer {layer} was not loaded (last_layer was {loaded - 1}); load the engine again"
            )

    def check_head(self) -> None:
        """Raises ValueError if the engine was loaded without the later layers and the head."""
        if not self.has_head:
            raise ValueError(
                f"the engine was loaded up to layer {self.loaded_layers - 1} only, which "
                "gives residuals but no text; load it without last_layer"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ValueError if there are too many ids, or one is outside the vocabulary."""
        if len(ids) > self.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the model's context is {self.context}; "
                "shorten the prompt"
            )
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary "
                f"(0 to {self.vocab_size - 1})"
            )

    # -- text ---------------------------------------------------------------------------------

    @property
    def default_stop_ids(self) -> frozenset[int]:
        """The end of sentence."""
        return frozenset({self.eos_id if self.tokenizer is None else self.tokenizer.eos_id})

    def require_tokenizer(self) -> TextTokenizer:
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
        self.check_ids(ids)
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a raw text, with the beginning-of-sentence token in front (once).

        Raises:
            ValueError: the text is empty or longer than the context.
        """
        tokenizer = self.require_tokenizer()
        ids = tokenizer.encode(text)
        if not ids:
            raise ValueError("the text is empty")
        if tokenizer.bos_id is not None and ids[0] != tokenizer.bos_id:
            ids = [tokenizer.bos_id, *ids]
        self.check_ids(ids)
        return ids

    def segments(self, tokens: Sequence[int], prompt_length: int | None = None) -> list[int]:
        """Prompt, thinking or response, of each token: :func:`r1sae_fast.r1.segments.segments`."""
        tokenizer = self.tokenizer
        return segments(
            tokens,
            think_id=None if tokenizer is None else tokenizer.think_id,
            end_think_id=None if tokenizer is None else tokenizer.end_think_id,
            prompt_length=prompt_length,
        )
