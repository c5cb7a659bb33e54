"""The weights of a pass as a list of readings, in the order in which they are needed."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from r1sae_fast.r1.blocks import Fp8Mode, empty_block, fill_block
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8_experts import Fp8Experts
from r1sae_fast.r1.fp8_linear import Fp8Linear, WeightCache
from r1sae_fast.r1.layout import TensorSpec, embedding_specs
from r1sae_fast.r1.model import Block
from r1sae_fast.r1.moe import MoE
from r1sae_fast.r1.stream.loader import Job, Stopped
from r1sae_fast.r1.weights import CheckpointReader


class StoppableReader(CheckpointReader):
    """Can be told to give up a block half-way."""

    stopping: threading.Event | None = None

    def _check(self) -> None:
        if self.stopping is not None and self.stopping.is_set():
            raise Stopped

    def read_into(self, spec: TensorSpec, target: Tensor) -> None:
        """See :class:`CheckpointReader`."""
        self._check()
        super().read_into(spec, target)

    def read_fp8_into(self, spec: TensorSpec, weight: Tensor, scale_inv: Tensor) -> None:
        """See :class:`CheckpointReader`."""
        self._check()
        super().read_fp8_into(spec, weight, scale_inv)


class Weights:
    """Makes room for blocks and parts of blocks, and fills it from the checkpoint."""

    def __init__(
        self,
        reader: CheckpointReader,
        config: R1Config,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fp8: Fp8Mode,
        weight_cache: WeightCache,
    ) -> None:
        self._reader, self._config = reader, config
        self._dtype, self._device = dtype, device
        self._fp8: Fp8Mode = fp8
        self._weight_cache: WeightCache = weight_cache

    def jobs(self, blocks: range, group: int | None, chunks: int) -> list[Job[Block]]:
        """All that ``blocks`` need: of a mixture read in groups, first all but the routed
        experts, then group after group, as often as there are chunks."""
        jobs: list[Job[Block]] = []
        for index in blocks:
            if group is None or index < self._config.first_k_dense_replace:
                jobs.append(self._whole(index))
                continue
            jobs.append(self._rest(index))
            starts = range(0, self._config.n_routed_experts, group)
            jobs += [self._group(index, start, group) for start in starts] * chunks
        return jobs

    def _empty(self, index: int, device: torch.device | str, experts: int | None = None) -> Block:
        return empty_block(
            self._reader,
            self._config,
            index,
            dtype=self._dtype,
            device=device,
            fp8=self._fp8,
            weight_cache=self._weight_cache,
            experts=experts,
        )

    def _whole(self, index: int) -> Job[Block]:
        kind = "dense" if index < self._config.first_k_dense_replace else "mixture"

        def fill(block: Block) -> None:
            fill_block(self._reader, block, self._config, index)

        return Job(kind, lambda: self._empty(index, self._device), fill, _forget)

    def _rest(self, index: int) -> Job[Block]:
        def make() -> Block:
            block = self._empty(index, "meta", 1)
            assert isinstance(block.mlp, MoE)
            experts = block.mlp.experts
            del block.mlp.experts  # stays without memory
            block.to_empty(device=self._device)
            block.mlp.experts = experts
            return block

        def fill(block: Block) -> None:
            fill_block(self._reader, block, self._config, index, parts="rest")

        return Job("rest", make, fill, _forget)

    def _group(self, index: int, start: int, size: int) -> Job[Block]:
        stop = min(start + size, self._config.n_routed_experts)

        def make() -> Block:
            block = self._empty(index, "meta", size)
            assert isinstance(block.mlp, MoE)
            block.mlp.experts.to_empty(device=self._device)
            return block

        def fill(block: Block) -> None:
            experts = range(start, stop)
            fill_block(self._reader, block, self._config, index, experts=experts, parts="experts")

        return Job("group", make, fill, _forget)


def _forget(block: Block) -> None:
    """Drops the dequantised copies: the next part makes its own before this one is filled."""
    for module in block.modules():
        if isinstance(module, (Fp8Linear, Fp8Experts)):
            module.forget_dense()


def embed(reader: CheckpointReader, config: R1Config, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding [..., hidden], read where they stand: of 1.9 GB in R1, a batch needs
    few."""
    spec = next(embedding_specs(config))
    reader.is_fp8(spec)  # refuses other shapes and dtypes
    rows = reader.raw(spec.name)[tokens].to(dtype)
    reader.release(spec.name)
    return rows
