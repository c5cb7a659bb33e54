"""DeepSeek-V3/R1: embedding, blocks, final norm, head. The same code runs TinyR1 and R1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r1sae_fast.r1.attention import LatentAttention
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.moe import MLP, MoE
from r1sae_fast.r1.norm import RMSNorm
from r1sae_fast.r1.rope import rotary_table


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: R1Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp: MLP | MoE = (
            MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        )

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """Residual stream before the block [batch, seq, hidden] to the one after it."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, bias)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]  # nn.Module calls are untyped


def causal_bias(seq: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[seq, seq]: 0 where a query may see a key, -inf above the diagonal."""
    return torch.full((seq, seq), -torch.inf, device=device, dtype=dtype).triu(1)


class R1Model(nn.Module):
    """The whole model, with R1's module names (minus the ``model.`` prefix of its tensors)."""

    def __init__(self, config: R1Config, *, last_layer: int | None = None) -> None:
        """Builds the modules.

        Args:
            config: the shape.
            last_layer: build only the embedding and blocks 0 to this one, no norm and no head.

        Raises:
            ValueError: no such layer.
        """
        super().__init__()
        self.config = config
        count = config.num_hidden_layers
        if last_layer is not None:
            if not 0 <= last_layer < count:
                raise ValueError(
                    f"layer {last_layer} does not exist: the model has 0 to {count - 1}"
                )
            count = last_layer + 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(count))
        if last_layer is None:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [batch, seq] (right-padded, if at all) to the normalised last residual
        [batch, seq, hidden]; ``lm_head`` makes logits of it."""
        dtype = self.norm.weight.dtype
        x = self.embed_tokens(tokens).to(dtype)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rotary = rotary_table(self.config, positions)
        bias = causal_bias(tokens.shape[1], tokens.device, dtype)
        for block in self.layers:
            x = block(x, rotary, bias)
        return self.norm(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped
