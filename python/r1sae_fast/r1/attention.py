"""Multi-head latent attention (MLA), DeepSeek-V2/V3.

Keys and values of all heads are expanded from one latent of ``kv_lora_rank`` a token; position
enters through a separate rotary key shared by all heads. Source: arXiv:2405.04434, section 2.1.

Two ways to the same result: whole sequences expand the latents into keys and values; steps on a
cache leave them as they are and move the expansion to the query and the output instead
("absorbed"), which reads 576 numbers a cached token rather than all heads' keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1sae_fast.r1 import glue
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.linear import Linear
from r1sae_fast.r1.norm import RMSNorm
from r1sae_fast.r1.rope import attention_scale, rotate, rotate_


class LatentAttention(nn.Module):
    """Causal self-attention of one block, with R1's parameter names."""

    def __init__(
        self,
        config: R1Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where: Any = {"device": device, "dtype": dtype}
        heads = config.num_attention_heads
        width = config.hidden_size
        self.q_a_proj = Linear(width, config.q_lora_rank, **where)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps, **where)
        self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, **where)
        self.kv_a_proj_with_mqa = Linear(
            width, config.kv_lora_rank + config.qk_rope_head_dim, **where
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps, **where)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), **where
        )
        self.o_proj = Linear(heads * config.v_head_dim, width, **where)
        self.scale = attention_scale(config)

    def _queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        """[batch, seq, heads, qk_head_dim]: the part without position, then the rotary one."""
        config = self.config
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        q_nope, q_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        if torch.is_grad_enabled():
            query = torch.cat((q_nope, rotate(q_rope, rotary[:, :, None])), -1)
        elif not glue.rotate_(query, rotary):
            rotate_(q_rope, rotary[:, :, None])
        return query  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def _latents(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens are attended by: normalised latent [batch, seq, kv_lora_rank] and
        turned rotary key [batch, seq, rope_dim]."""
        config, norm = self.config, self.kv_a_layernorm
        rows = self.kv_a_proj_with_mqa(x)
        in_place = glue.latents_(rows, norm.weight, norm.eps, rotary)
        latent, k_rope = rows.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        return (latent, k_rope) if in_place else (norm(latent), rotate(k_rope, rotary))

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        bias: Tensor | None = None,
        cache: Tensor | None = None,
    ) -> Tensor:
        """Attends causally over whole sequences.

        Args:
            x: [batch, seq, hidden], normalised.
            rotary: of the positions, [batch or 1, seq, rope_dim / 2, 2].
            bias: None for plain causal attention; else added to the scores in its stead,
                broadcast to [batch, heads, seq, seq], -inf hiding a key.
            cache: if given, one layer's rows of a :class:`LatentCache`, whose first ``seq`` slots
                are filled.
        """
        config = self.config
        batch, seq, _ = x.shape
        heads = config.num_attention_heads
        x = self.q_a_proj.prepare(x)
        query = self._queries(x, rotary).transpose(1, 2)
        latent, k_rope = self._latents(x, rotary)
        if cache is not None:
            cache[:, :seq, : config.kv_lora_rank] = latent
            cache[:, :seq, config.kv_lora_rank :] = k_rope
        expanded = self.kv_b_proj(latent)
        expanded = expanded.view(batch, seq, heads, config.qk_nope_head_dim + config.v_head_dim)
        k_nope = expanded[..., : config.qk_nope_head_dim]
        key = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)), -1).transpose(1, 2)
        # torch's fused kernels want values as wide as the keys, and the unfused path needs memory
        # for every pair of tokens. So some of the numbers that lie in front of the values are
        # mixed as well and thrown away, which costs less than a copy with zeros.
        wide = max(config.qk_head_dim, config.v_head_dim)
        if wide <= expanded.shape[-1]:
            value = expanded[..., -wide:]
        else:
            value = F.pad(expanded, (wide - expanded.shape[-1], 0))
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value.transpose(1, 2),
            attn_mask=bias,
            is_causal=bias is None,
            scale=self.scale,
        )[..., -config.v_head_dim :]
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def step(
        self,
        x: Tensor,
        rotary: Tensor,
        cache: Tensor,
        slots: tuple[Tensor, Tensor],
        bias: Tensor,
    ) -> Tensor:
        """Attends from new tokens to the cache and to each other, without expanding the cache.

        Args:
            x: [batch, new, hidden], normalised.
            rotary: of their positions, [batch, new, rope_dim / 2, 2].
            cache: one layer's rows, [batch, capacity, latent width]; the new tokens' are added.
            slots: where they go: sequence and slot, each int64 [batch, new].
            bias: [batch, new, 1, length], -inf hiding a slot; ``length`` slots are looked at.
        """
        config = self.config
        batch, new, _ = x.shape
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        x = self.q_a_proj.prepare(x)
        query = self._queries(x, rotary)
        parts = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        q_nope, q_rope = torch.split(query, parts, -1)
        latent, k_rope = self._latents(x, rotary)
        cache[slots] = torch.cat((latent, k_rope), -1)
        seen = cache[:, : bias.shape[-1]]

        up = self.kv_b_proj.weight.view(heads, -1, rank)
        key_up, value_up = up[:, : config.qk_nope_head_dim], up[:, config.qk_nope_head_dim :]
        # q . (W_k c) = (W_k^T q) . c, a product a head; likewise W_v after the mixing.
        absorbed = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), key_up)
        absorbed = absorbed.transpose(0, 1).reshape(batch, new, heads, rank)
        query = torch.cat((absorbed, q_rope), -1).view(batch, new * heads, -1)
        # To the cache, all heads of all new tokens are queries on one and the same key.
        if new > 1:
            bias = bias.expand(-1, -1, heads, -1).reshape(batch, 1, new * heads, -1)
        mixed = F.scaled_dot_product_attention(
            query[:, None], seen[:, None], seen[:, None], attn_mask=bias, scale=self.scale
        )[..., :rank]
        mixed = mixed.reshape(batch * new, heads, rank).transpose(0, 1)
        mixed = torch.bmm(mixed, value_up.transpose(1, 2))
        return self.o_proj(mixed.transpose(0, 1).reshape(batch, new, -1))  # type: ignore[no-any-return]  # nn.Module calls are untyped
