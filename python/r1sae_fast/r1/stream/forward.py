"""One block for all micro-batches: whole, or a mixture's experts group after group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.model import Block
from r1sae_fast.r1.moe import MoE
from r1sae_fast.r1.rope import rotary_table
from r1sae_fast.r1.stream.batches import MicroBatch
from r1sae_fast.r1.stream.loader import ReadAhead
from r1sae_fast.r1.stream.plan import StreamPlan, split_chunks
from r1sae_fast.r1.stream.process import MemoryKeeper
from r1sae_fast.r1.stream.scratch import Hidden
from r1sae_fast.r1.stream.weights import embed
from r1sae_fast.r1.weights import CheckpointReader


@dataclass
class _Held:
    """A micro-batch between its attention and its last group of experts."""

    batch: MicroBatch
    x: Tensor
    experts: Tensor
    weights: Tensor
    total: Tensor


class StreamForward:
    """Takes weights and hidden states as they come and calls the model's own modules."""

    def __init__(
        self,
        config: R1Config,
        reader: CheckpointReader,
        dtype: torch.dtype,
        device: torch.device,
        parts: ReadAhead[Block],
        hidden: Hidden,
        keeper: MemoryKeeper,
    ) -> None:
        self._config, self._reader = config, reader
        self._dtype, self._device = dtype, device
        self._parts, self._hidden, self._keeper = parts, hidden, keeper

    def block(
        self, index: int, batches: Sequence[MicroBatch], plan: StreamPlan
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch and its residual stream [sequences, length, hidden] after the block,
        in order."""
        if plan.group is not None and index >= self._config.first_k_dense_replace:
            yield from self._grouped(index, batches, plan)
            return
        with self._parts.part() as block:
            for batch, x in self._inputs(index, batches):
                yield batch, self._whole(block, batch, x)

    def _inputs(
        self, index: int, batches: Sequence[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        for number, batch in enumerate(batches):
            self._keeper.before_step()
            shape = (len(batch.sequences), batch.length, -1)
            if index == 0:
                x = embed(self._reader, self._config, batch.tokens(), self._dtype)
            else:
                x = self._hidden.read(batch.first, batch.rows)
                if number + 1 < len(batches):
                    following = batches[number + 1]
                    self._hidden.prefetch(following.first, following.rows)
            yield batch, x.to(self._device).view(shape)

    def _rotary(self, batch: MicroBatch) -> Tensor:
        return rotary_table(self._config, torch.arange(batch.length, device=self._device)[None])

    @torch.no_grad()
    def _whole(self, block: Block, batch: MicroBatch, x: Tensor) -> Tensor:
        return block(x, self._rotary(batch))  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def _grouped(
        self, index: int, batches: Sequence[MicroBatch], plan: StreamPlan
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        assert plan.group is not None
        sizes = [(len(batch.sequences), batch.length) for batch in batches]
        with self._parts.part() as rest:
            for chunk in split_chunks(sizes, plan.chunk_rows):
                inputs = self._inputs(index, batches[chunk.start : chunk.stop])
                held = [self._attend(rest, batch, x) for batch, x in inputs]
                for first in range(0, self._config.n_routed_experts, plan.group):
                    with self._parts.part() as group:
                        for one in held:
                            self._keeper.before_step()
                            self._add_group(rest, group, one, first)
                while held:
                    one = held.pop(0)
                    self._keeper.before_step()
                    yield one.batch, self._finish(rest, one)

    # The three together are Block.forward and MoE.forward, with the experts' sum cut in groups.

    @torch.no_grad()
    def _attend(self, rest: Block, batch: MicroBatch, x: Tensor) -> _Held:
        x = x + rest.self_attn(rest.input_layernorm(x), self._rotary(batch))
        flat = rest.post_attention_layernorm(x).reshape(-1, x.shape[-1])
        experts, weights = _mixture(rest).gate(flat)
        return _Held(batch, x, experts, weights, flat.new_zeros(flat.shape, dtype=torch.float32))

    @torch.no_grad()
    def _add_group(self, rest: Block, group: Block, one: _Held, first: int) -> None:
        flat = rest.post_attention_layernorm(one.x).reshape(-1, one.x.shape[-1])
        _mixture(group).experts.add_part(one.total, flat, one.experts, one.weights, first)

    @torch.no_grad()
    def _finish(self, rest: Block, one: _Held) -> Tensor:
        normed = rest.post_attention_layernorm(one.x)
        routed = one.total.to(normed.dtype).view_as(normed)
        return one.x + (routed + _mixture(rest).shared_experts(normed))  # type: ignore[no-any-return]  # nn.Module calls are untyped


def _mixture(block: Block) -> MoE:
    assert isinstance(block.mlp, MoE)
    return block.mlp
