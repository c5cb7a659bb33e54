"""The model in this process, on one device."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from r1sae_fast.r1.blocks import Fp8Mode
from r1sae_fast.r1.chat import Tokenizer
from r1sae_fast.r1.checkpoint import load_model
from r1sae_fast.r1.engines.base import (
    checkpoint_name,
    describe_fp8,
    fingerprint,
    resolve_checkpoint,
)
from r1sae_fast.r1.engines.tapped import Lengths, TappedEngine, TokenIds
from r1sae_fast.r1.fp8_linear import WeightCache
from r1sae_fast.r1.generate import Written, generate_steps
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.r1.taps.run import TapRun


class LocalEngine(TappedEngine):
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
        super().__init__()
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

    def describe(self) -> dict[str, Any]:
        """The dtype, and how a checkpoint in fp8 is computed with."""
        form = self.model.fp8
        fp8 = {} if form == "none" else describe_fp8(form, self.device)
        return {**super().describe(), **fp8}

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError where there is none."""
        super().require_tokenizer()
        assert self.tokenizer is not None  # or super() has raised
        return self.tokenizer

    def _forward(self, tokens: Tensor, layer: int, taps: TapRun | None) -> Tensor:
        return self.model.residual(tokens, layer, taps=taps)

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stop_ids: Collection[int],
        numbers: Sequence[int],
        taps: TapRun | None,
    ) -> Generator[list[Written], None, None]:
        return generate_steps(
            self.model,
            prompts,
            sampling,
            stop_ids=stop_ids,
            context=self.context,
            numbers=numbers,
            taps=taps,
        )

    @torch.no_grad()
    def logits(self, token_ids: TokenIds, lengths: Lengths = None) -> Tensor:
        """Logits of the next token, float32 [batch, seq, vocab]; zeros at padding.

        Arguments and errors as for :meth:`residuals`.
        """
        self.check_head()
        last = self.config.num_hidden_layers - 1
        residual = self.residuals(token_ids, last, lengths)
        logits: Tensor = self.model.lm_head(self.model.norm(residual))
        return logits.float()
