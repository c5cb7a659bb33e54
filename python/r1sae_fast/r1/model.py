"""DeepSeek-V3/R1: embedding, blocks, final norm, head. The same code runs TinyR1 and R1."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from r1sae_fast.r1.attention import LatentAttention
from r1sae_fast.r1.cache import LatentCache, NewSlots
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.linear import Embedding, Linear
from r1sae_fast.r1.moe import MLP, MoE
from r1sae_fast.r1.norm import RMSNorm
from r1sae_fast.r1.rope import rotary_table


class BlockTap(Protocol):
    """Called at a named point of a block; what it returns goes on in place of ``value``."""

    def __call__(self, point: str, value: Tensor) -> Tensor:
        """``point`` is input, self_attn, mlp or output; ``value`` [batch, seq, hidden]."""


class ModelTaps(Protocol):
    """What reads and writes inside a forward; see :mod:`r1sae_fast.r1.taps`."""

    def at(self, layer: int) -> BlockTap | None:
        """The tap of a block, None where nothing is attached to it."""


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        config: R1Config,
        index: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps, device, dtype)
        self.self_attn = LatentAttention(config, device, dtype)
        self.post_attention_layernorm = RMSNorm(width, eps, device, dtype)
        self.mlp: MLP | MoE = (
            MLP(width, config.intermediate_size, device, dtype)
            if index < config.first_k_dense_replace
            else MoE(config, device, dtype)
        )

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        bias: Tensor | None = None,
        cache: Tensor | None = None,
        tap: BlockTap | None = None,
    ) -> Tensor:
        """Residual stream before the block [batch, seq, hidden] to the one after it; the other
        arguments are :meth:`LatentAttention.forward`'s."""
        x = x if tap is None else tap("input", x)
        mixed = self.self_attn(self.input_layernorm(x), rotary, bias, cache)
        return self._add(x, mixed, tap)

    def step(
        self,
        x: Tensor,
        rotary: Tensor,
        cache: Tensor,
        slots: NewSlots,
        tap: BlockTap | None = None,
    ) -> Tensor:
        """The same for new tokens [batch, new, hidden] after cached ones; the other arguments
        are :meth:`LatentAttention.step`'s."""
        x = x if tap is None else tap("input", x)
        mixed = self.self_attn.step(self.input_layernorm(x), rotary, cache, slots)
        return self._add(x, mixed, tap)

    def _add(self, x: Tensor, mixed: Tensor, tap: BlockTap | None) -> Tensor:
        """Adds what attention gives, then what the feed-forward makes of the sum."""
        if tap is None:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]  # nn.Module calls are untyped
        x = x + tap("self_attn", mixed)
        x = x + tap("mlp", self.mlp(self.post_attention_layernorm(x)))
        return tap("output", x)


class R1Model(nn.Module):
    """The whole model, with R1's module names (minus the ``model.`` prefix of its tensors)."""

    def __init__(
        self,
        config: R1Config,
        *,
        last_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds the modules; their weights are yet to be filled.

        Args:
            config: the shape.
            last_layer: build only the embedding and blocks 0 to this one, no norm and no head.
            device: of all parameters.
            dtype: of all parameters; the routers' correction biases are always float32.

        Raises:
            ValueError: no such layer.
        """
        super().__init__()
        self.config = config
        # How the weights are kept that the checkpoint has in fp8, see load_model.
        self.fp8: Literal["none", "w8a8", "dequantize"] = "none"
        count = config.num_hidden_layers
        if last_layer is not None:
            if not 0 <= last_layer < count:
                raise ValueError(
                    f"layer {last_layer} does not exist: the model has 0 to {count - 1}"
                )
            count = last_layer + 1
        vocabulary, width = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(vocabulary, width, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, index, device, dtype) for index in range(count))
        if last_layer is None:
            self.norm = RMSNorm(width, config.rms_norm_eps, device, dtype)
            self.lm_head = Linear(width, vocabulary, device, dtype)

    @property
    def has_head(self) -> bool:
        """False for a model built only up to a layer."""
        return hasattr(self, "lm_head")

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        norm: nn.Module = self.layers[0].input_layernorm  # type: ignore[assignment]  # a Block's norm
        return norm.weight.dtype  # type: ignore[return-value]  # a parameter

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [batch, seq] (right-padded, if at all) to the normalised last residual
        [batch, seq, hidden]; ``lm_head`` makes logits of it."""
        return self.norm(self.residual(tokens))  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def residual(
        self,
        tokens: Tensor,
        layer: int | None = None,
        cache: LatentCache | None = None,
        taps: ModelTaps | None = None,
    ) -> Tensor:
        """Token ids [batch, seq] to the residual stream after block ``layer`` (default: the last)
        [batch, seq, hidden]; later blocks are not run.

        Attention is causal and sequences start at position 0, so padding on the right changes
        nothing in front of it. With a ``cache``, its first ``seq`` slots are filled on the way.
        ``taps`` read and write at points on the way.
        """
        x = self.embed_tokens(tokens).to(self.dtype)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rotary = rotary_table(self.config, positions)
        blocks = self.layers if layer is None else self.layers[: layer + 1]
        for index, block in enumerate(blocks):
            tap = None if taps is None else taps.at(index)
            x = block(x, rotary, cache=None if cache is None else cache.rows[index], tap=tap)
        return x  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def step(self, tokens: Tensor, cache: LatentCache, taps: ModelTaps | None = None) -> Tensor:
        """Residual stream after the last block [batch, new, hidden] for new tokens
        [batch, new] that continue the cached sequences; the cache grows by them."""
        slots = cache.grow(tokens.shape[1])
        x = self.embed_tokens(tokens).to(self.dtype)
        rotary = cache.rotary[slots.positions]
        for index, block in enumerate(self.layers):
            tap = None if taps is None else taps.at(index)
            x = block.step(x, rotary, cache.rows[index], slots, tap)  # type: ignore[operator]  # a Block
        return x  # type: ignore[no-any-return]  # nn.Module calls are untyped
