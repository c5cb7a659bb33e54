"""Feed-forward blocks: the dense one, and DeepSeek's mixture of experts.

Router: sigmoid scores, experts chosen by score plus a correction bias that balances the load
without an auxiliary loss (``noaux_tc``), limited to ``topk_group`` of ``n_group`` groups;
the chosen scores, without the bias, are normalised and scaled. Source: arXiv:2412.19437, 2.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1sae_fast.r1 import glue
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.linear import Linear
from r1sae_fast.r1.shapes import padded

# Up to these, running every expert on every token costs less than sorting the tokens.
_FEW_TOKENS = 64
_FEW_EXPERTS = 4  # times the experts of a token


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    activated = F.silu(gate)
    return activated * up if torch.is_grad_enabled() else activated.mul_(up)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        width: int,
        intermediate: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(width, intermediate, device, dtype)
        self.up_proj = Linear(width, intermediate, device, dtype)
        self.down_proj = Linear(intermediate, width, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        x = self.gate_proj.prepare(x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class Router(nn.Module):
    """Chooses each token's experts and their weights."""

    def __init__(
        self,
        config: R1Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(
            torch.empty(experts, config.hidden_size, device=device, dtype=dtype)
        )
        # Float32 in every checkpoint and every dtype of the rest, as in R1.
        bias = torch.zeros(experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)
        self.e_score_correction_bias: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] to (experts int64, weights float32), both [tokens, experts_per_tok]."""
        config = self.config
        logits = F.linear(x.float(), self.weight.float())
        if glue.serves(logits, self.e_score_correction_bias):
            return glue.route(
                logits,
                self.e_score_correction_bias,
                groups=config.n_group,
                kept_groups=config.topk_group,
                experts=config.num_experts_per_tok,
                normalise=config.norm_topk_prob,
                scale=config.routed_scaling_factor,
            )
        scores = logits.sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if config.n_group > 1:
            size = choice.shape[-1] // config.n_group
            grouped = choice.view(*choice.shape[:-1], config.n_group, size)
            # A group is as good as its two best experts.
            strength = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
            kept = torch.zeros_like(strength, dtype=torch.bool)
            kept.scatter_(-1, strength.topk(config.topk_group, -1).indices, True)
            choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(config.num_experts_per_tok, -1).indices
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, with rows of zeros after them where that makes for fewer shapes."""
    count = rows.shape[0]
    size = padded(count, x.dtype, x.device)
    if size == count:
        return x.index_select(0, rows)
    if torch.is_grad_enabled():
        return F.pad(x.index_select(0, rows), (0, 0, 0, size - count))
    taken = x.new_empty(size, x.shape[1])
    torch.index_select(x, 0, rows, out=taken[:count])
    taken[count:] = 0
    return taken


class Experts(nn.Module):
    """Routed experts of a block, stacked: gate_up [experts, 2 * inter, hidden] and
    down [experts, hidden, inter]. A checkpoint's per-expert tensors are slices of these.

    All of a block's, or ``count`` consecutive ones where all don't fit in memory.
    """

    def __init__(
        self,
        config: R1Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        count: int | None = None,
    ) -> None:
        super().__init__()
        count = config.n_routed_experts if count is None else count
        inter, width = config.moe_intermediate_size, config.hidden_size
        self.gate_up = nn.Parameter(
            torch.empty(count, 2 * inter, width, device=device, dtype=dtype)
        )
        self.down = nn.Parameter(torch.empty(count, width, inter, device=device, dtype=dtype))

    def quantize(self, x: Tensor) -> Tensor:
        """What the products take in place of ``x``; Fp8Experts round it to fp8 here."""
        return x

    def expert(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One expert's (gate_up [2 * inter, hidden], down [hidden, inter]) for a product in
        ``dtype``."""
        return self.gate_up[index], self.down[index]

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """All experts' (gate_up, down), None where Fp8Experts dequantise one at a time."""
        return self.gate_up, self.down

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Sums each token's experts: x [tokens, hidden], experts and weights [tokens, k]."""
        tokens, k = experts.shape
        stacked = self.stacked(x.dtype)
        few = tokens <= _FEW_TOKENS and self.gate_up.shape[0] <= _FEW_EXPERTS * k
        if stacked is not None and few:
            every = self._every_expert(x, *stacked)
            outputs = every[experts, torch.arange(tokens, device=x.device)[:, None]]
            return (outputs * weights.to(x.dtype)[..., None]).sum(1)
        total = x.new_zeros(x.shape, dtype=torch.float32)
        self.add_part(total, x, experts, weights)
        return total.to(x.dtype)

    def add_part(
        self, total: Tensor, x: Tensor, experts: Tensor, weights: Tensor, first: int = 0
    ) -> None:
        """Adds these experts' part to ``total`` float32 [tokens, hidden], in place.

        A token's experts are added one by one in ascending order. So the parts of groups of
        experts, added in order, make the sum over all of them to the bit: the streaming engine,
        which has but a group in memory, rests on this. ``first`` is the number of the first of
        these experts among the block's.
        """
        k = experts.shape[1]
        count = self.gate_up.shape[0]
        chosen = experts.flatten() - first
        order = chosen.argsort(stable=True)
        before = int((chosen < 0).sum()) if first else 0
        inside = chosen[(chosen >= 0) & (chosen < count)]
        counts = torch.bincount(inside, minlength=count).tolist()
        parts = torch.split(order[before : before + inside.shape[0]], counts)
        scales = weights.flatten()
        given = self.quantize(x)
        for index, slots in enumerate(parts):
            if slots.shape[0]:
                rows = slots // k
                gate_up, down = self.expert(index, x.dtype)
                gate, up = F.linear(gather(given, rows), gate_up).chunk(2, -1)
                output = F.linear(self.quantize(gated(gate, up)), down)[: rows.shape[0]]
                # A token has an expert once, so no row is added to twice: deterministic.
                total.index_add_(0, rows, output * scales.index_select(0, slots)[:, None])

    def _every_expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """[experts, tokens, hidden]: more arithmetic, but two products instead of two an expert."""
        together = F.linear(self.quantize(x), gate_up.flatten(0, 1))
        gate, up = together.view(x.shape[0], gate_up.shape[0], -1).chunk(2, -1)
        hidden = self.quantize(gated(gate, up))
        return torch.bmm(hidden.transpose(0, 1), down.transpose(1, 2))


class MoE(nn.Module):
    """Routed experts plus the shared expert that sees every token."""

    def __init__(
        self,
        config: R1Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate = Router(config, device, dtype)
        self.experts = Experts(config, device, dtype)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        flat = x.reshape(-1, x.shape[-1])
        experts, weights = self.gate(flat)
        routed = self.experts(flat, experts, weights)
        return routed.view_as(x) + self.shared_experts(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def runs_every_expert(tokens: int, experts: int, k: int) -> bool:
    """Whether :meth:`Experts.forward` takes the way for few tokens and few experts, which needs
    all of a block's experts at once and rounds otherwise than the other."""
    return tokens <= _FEW_TOKENS and experts <= _FEW_EXPERTS * k
