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
from r1sae_fast.r1.cache import NewSlots
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
        self._turned: tuple[tuple[Any, ...], Tensor] | None = None

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

    def _latents(self, x: Tensor, rotary: Tensor) -> Tensor:
        """What the tokens are attended by, [batch, seq, kv_lora_rank + rope_dim]: the normalised
        latent, then the turned rotary key."""
        config, norm = self.config, self.kv_a_layernorm
        rows = self.kv_a_proj_with_mqa(x)
        in_place = glue.latents_(rows, norm.weight, norm.eps, rotary)
        if in_place:
            return rows  # type: ignore[no-any-return]  # nn.Module calls are untyped
        latent, k_rope = rows.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        return torch.cat((norm(latent), rotate(k_rope, rotary)), -1)

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
        rows = self._latents(x, rotary)
        if cache is not None:
            cache[:, :seq] = rows
        latent, k_rope = rows[..., : config.kv_lora_rank], rows[..., config.kv_lora_rank :]
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

    def step(self, x: Tensor, rotary: Tensor, cache: Tensor, slots: NewSlots) -> Tensor:
        """Attends from new tokens to the cache and to each other, without expanding the cache.

        Args:
            x: [batch, new, hidden], normalised.
            rotary: of their positions, [batch, new, rope_dim / 2, 2].
            cache: one layer's rows, [batch, capacity, latent width]; the new tokens' are added.
            slots: where they go.
        """
        config = self.config
        batch, new, _ = x.shape
        x = self.q_a_proj.prepare(x)
        query = self._queries(x, rotary)
        rows = self._latents(x, rotary)

        key_up, value_up = self._expansion()
        # q . (W_k c) = (W_k^T q) . c, a product a head; likewise W_v after the mixing.
        q_nope = query[..., : config.qk_nope_head_dim]
        absorbed = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), key_up)
        mixed = glue.attend(rows, absorbed, query, cache, slots.positions, self.scale)
        if mixed is None:
            q_rope = query[..., config.qk_nope_head_dim :]
            mixed = self._attend(rows, absorbed, q_rope, cache, slots)
        mixed = torch.bmm(mixed, value_up)
        return self.o_proj(mixed.transpose(0, 1).reshape(batch, new, -1))  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def _expansion(self) -> tuple[Tensor, Tensor]:
        """What keys and values are made with of latents: [heads, nope, rank], [heads, rank, value].

        The second is kept, for torch would copy it in every step to turn it.
        """
        config, weight = self.config, self.kv_b_proj.weight
        up = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        key_up, value_up = up[:, : config.qk_nope_head_dim], up[:, config.qk_nope_head_dim :]
        turned = value_up.transpose(1, 2)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return key_up, turned
        state = weight.data_ptr(), weight._version, weight.dtype, weight.device
        if self._turned is None or self._turned[0] != state:
            self._turned = state, turned.contiguous()
        return key_up, self._turned[1]

    def _attend(
        self, rows: Tensor, absorbed: Tensor, q_rope: Tensor, cache: Tensor, slots: NewSlots
    ) -> Tensor:
        """:func:`glue.attend` in torch, for any device, dtype and number of heads."""
        batch, new, _ = rows.shape
        heads, _, rank = absorbed.shape
        slots.write(cache, rows)
        bias, seen = slots.bias(rows.dtype), cache[:, : slots.window]
        absorbed = absorbed.transpose(0, 1).reshape(batch, new, heads, rank)
        query = torch.cat((absorbed, q_rope), -1).view(batch, new * heads, -1)
        # To the cache, all heads of all new tokens are queries on one and the same key.
        if new > 1:
            bias = bias.expand(-1, -1, heads, -1).reshape(batch, 1, new * heads, -1)
        mixed = F.scaled_dot_product_attention(
            query[:, None], seen[:, None], seen[:, None], attn_mask=bias, scale=self.scale
        )[..., :rank]
        return mixed.reshape(batch * new, heads, rank).transpose(0, 1)
