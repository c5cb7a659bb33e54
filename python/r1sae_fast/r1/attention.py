"""Multi-head latent attention (MLA), DeepSeek-V2/V3.

Keys and values of all heads are expanded from one latent of ``kv_lora_rank`` a token; position
enters through a separate rotary key shared by all heads. Source: arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.norm import RMSNorm
from r1sae_fast.r1.rope import attention_scale, rotate


class LatentAttention(nn.Module):
    """Causal self-attention of one block, with R1's parameter names."""

    def __init__(self, config: R1Config) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        width = config.hidden_size
        self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            width, config.kv_lora_rank + config.qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=False)
        self.scale = attention_scale(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """Attends over the given tokens.

        Args:
            x: [batch, seq, hidden], normalised.
            rotary: cosines and sines, each [batch or 1, seq, rope_dim / 2].
            bias: added to the scores, broadcast to [batch, heads, seq, seq]; -inf hides a key.
        """
        config = self.config
        batch, seq, _ = x.shape
        heads = config.num_attention_heads
        table = (rotary[0][:, :, None], rotary[1][:, :, None])
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.view(batch, seq, heads, config.qk_head_dim)
        q_nope, q_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent))
        expanded = expanded.view(batch, seq, heads, config.qk_nope_head_dim + config.v_head_dim)
        k_nope, value = expanded.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        q_rope = rotate(q_rope, table)
        k_rope = rotate(k_rope[:, :, None], table).expand(-1, -1, heads, -1)
        query = torch.cat((q_nope, q_rope), -1).transpose(1, 2)
        key = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        scores = query @ key.transpose(-1, -2) * self.scale + bias
        weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        mixed = weights @ value.transpose(1, 2)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]  # nn.Module calls are untyped
