"""Any decoder that transformers can load: the R1 distillations (Qwen2, Llama) and others.

The same residuals, taps and harvests as with R1 itself, by forward hooks on the model's own
blocks; texts come from transformers' ``generate``. transformers is imported when an engine is
made, and is an extra: ``pip install 'r1sae-fast[hf]'``.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r1sae_fast.errors import CheckpointError, MissingExtraError
from r1sae_fast.r1.engines.base import checkpoint_name, fingerprint, resolve_checkpoint
from r1sae_fast.r1.engines.hf_hooks import StoppedAfterBlock, find_blocks, hooked
from r1sae_fast.r1.engines.hf_steps import hf_steps
from r1sae_fast.r1.engines.hf_tokenizer import HfTokenizer
from r1sae_fast.r1.engines.tapped import Lengths, TappedEngine, TokenIds
from r1sae_fast.r1.generate import Written
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.r1.taps.run import TapRun


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"this engine needs transformers ({error}); install it with: "
            "pip install 'r1sae-fast[hf]'"
        ) from None
    return transformers


class HfEngine(TappedEngine):
    """Runs a ``PreTrainedModel`` with a causal language model's head.

    A tap at ``self_attn`` or ``mlp`` is at the output of the block's module of that kind; in
    models that normalise it before they add it, that is before the norm.
    """

    tokenizer: HfTokenizer | None

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str = "unnamed",
        fingerprint: str = "",
        num_layers: int | None = None,
    ) -> None:
        """Wraps a loaded model, which is set to eval() and otherwise left as it is.

        Args:
            model: a ``PreTrainedModel``, such as ``AutoModelForCausalLM`` loads.
            tokenizer: a ``PreTrainedTokenizerBase``; without one, prompts must be token ids.
            name, fingerprint: written beside what is harvested.
            num_layers: blocks of the whole model, where ``model`` holds only the first ones.

        Raises:
            ValueError: the model's blocks are not where this engine looks for them.
        """
        super().__init__()
        _transformers()
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self.decoder: nn.Module = model.get_decoder()
        self.blocks = find_blocks(self.decoder)
        self.tokenizer = None if tokenizer is None else HfTokenizer(tokenizer)
        self.name = name
        self.fingerprint = fingerprint
        self._num_layers = len(self.blocks) if num_layers is None else num_layers
        self._busy = False

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: Path | str,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        last_layer: int | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> HfEngine:
        """Loads a model and its tokenizer with transformers' Auto classes.

        Args:
            checkpoint: a folder, or a repository of the hub. Code that comes with a checkpoint is
                never run.
            dtype: of weights and arithmetic.
            device: where to.
            last_layer: load no block after this one; then there are residuals up to it, but
                neither logits nor generation.
            revision: of the repository.
            local_files_only: do not ask the hub.

        Raises:
            MissingExtraError: transformers is not installed.
            CheckpointError: transformers cannot load it; its reason is told.
            ValueError: no such layer.
        """
        transformers = _transformers()
        directory = resolve_checkpoint(checkpoint)
        source = str(directory) if directory.is_dir() else str(checkpoint)
        options = {"revision": revision, "local_files_only": local_files_only}
        with _reported(source):
            config = transformers.AutoConfig.from_pretrained(source, **options)
        text = config.get_text_config()
        count: int = text.num_hidden_layers
        if last_layer is not None:
            if not 0 <= last_layer < count:
                raise ValueError(
                    f"layer {last_layer} does not exist: the model has 0 to {count - 1}"
                )
            text.num_hidden_layers = last_layer + 1
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: last_layer + 1]
        # That the checkpoint has more blocks than were asked for is not worth a warning.
        with _reported(source), _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, **options
            )
        if directory.is_dir():
            name, print_ = checkpoint_name(checkpoint), fingerprint(directory)
        else:
            name, print_ = source, str(getattr(config, "_commit_hash", None) or "")[:16]
        return cls(
            model.requires_grad_(False).to(device),
            tokenizer,
            name=name,
            fingerprint=print_,
            num_layers=count,
        )

    # -- the model ----------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Blocks of the whole model, loaded or not."""
        return self._num_layers

    @property
    def loaded_layers(self) -> int:
        """Blocks that were loaded, from 0."""
        return len(self.blocks)

    @property
    def has_head(self) -> bool:
        """False where only the blocks up to ``last_layer`` were loaded."""
        return len(self.blocks) == self._num_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def context(self) -> int:
        """Most tokens that a sequence may have; where the config does not say, a million."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2**20)

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def eos_id(self) -> int:
        """The first of the config's; -1, which no token is, where it names none."""
        ids = sorted(_ids(self.config.eos_token_id))
        return ids[0] if ids else -1

    @property
    def default_stop_ids(self) -> frozenset[int]:
        """All ends of sentence that tokenizer and checkpoint name (Llama 3 has three)."""
        named = _ids(getattr(self.model.generation_config, "eos_token_id", None))
        return super().default_stop_ids | named

    def describe(self) -> dict[str, Any]:
        """The dtype, and that transformers computes."""
        attention = getattr(self.model.config, "_attn_implementation", None)
        return {"engine": "hf", **super().describe(), "attention": attention}

    # -- running it ---------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hooks are the model's, not a call's: a second call would run into those of the first."""
        if self._busy:
            raise RuntimeError(
                "this engine is still generating; read its stream to the end, or close it"
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    @torch.no_grad()
    def _forward(self, tokens: Tensor, layer: int, taps: TapRun | None) -> Tensor:
        # Attention is causal and padding on the right, so no mask is needed.
        with self._alone(), hooked(self.blocks, taps, stop_after=layer):
            try:
                self.decoder(input_ids=tokens, use_cache=False)
            except StoppedAfterBlock as stopped:
                return stopped.value
        raise RuntimeError(f"block {layer} of {type(self.decoder).__name__} was not run")

    @torch.no_grad()
    def logits(self, token_ids: TokenIds, lengths: Lengths = None) -> Tensor:
        """Logits of the next token, float32 [batch, seq, vocab]; zeros at padding.

        Arguments and errors as for :meth:`residuals`.
        """
        self.check_head()
        tokens, present = self._batch(token_ids, lengths)
        run = self._batch_taps(tokens, present)
        if tokens.numel() == 0:
            return torch.zeros(*tokens.shape, self.vocab_size, device=self.device)
        with self._alone(), hooked(self.blocks, run):
            output = self.model(input_ids=torch.where(present, tokens, 0), use_cache=False)
        if run is not None:
            run.finish()
        logits: Tensor = output.logits.float()
        return logits.masked_fill(~present[..., None], 0)

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stop_ids: Collection[int],
        numbers: Sequence[int],
        taps: TapRun | None,
    ) -> Generator[list[Written], None, None]:
        with self._alone():
            yield from hf_steps(
                self.model,
                self.decoder,
                self.blocks,
                prompts,
                sampling,
                stop_ids=stop_ids,
                context=self.context,
                numbers=numbers,
                taps=taps,
            )


@contextmanager
def _reported(source: str) -> Iterator[None]:
    """What transformers finds wrong with a checkpoint, as the one kind of error that it is."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{source}: transformers cannot load it: {error}") from error


def _ids(ids: int | list[int] | None) -> frozenset[int]:
    return frozenset([ids] if isinstance(ids, int) else ids or [])


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
