"""Many processes as one: ranks on a mesh of rows by features."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from r1sae_fast.codes import SparseCodes
from r1sae_fast.train.losses.base import Finder
from r1sae_fast.train.parallel.collect import (
    add_up,
    broadcast,
    gather,
    gather_ragged,
    receive,
    send,
)
from r1sae_fast.train.parallel.layout import Layout
from r1sae_fast.train.parallel.ranks import Number
from r1sae_fast.train.parallel.selection import MergedFinder, Offer, Place, gather_rows, own_rows

__all__ = ["Grid", "share_of"]

_PIECE_NUMBERS = 1 << 24
"""A checkpoint's tensors go to the first rank in pieces of so many: 64 MiB."""


def share_of(number: int, part: int, parts: int) -> tuple[int, int]:
    """Of ``number`` things in order, those of part ``part``: from, to; parts differ by one."""
    return number * part // parts, number * (part + 1) // parts


class Grid:
    """The :class:`~r1sae_fast.train.parallel.ranks.Ranks` of a torch ``DeviceMesh``, data by
    latents; torch.distributed has begun.

    Args:
        layout: as many processes as there are.
        device: of the weights: the kind decides the backend (gloo for "cpu", nccl for "cuda").

    Raises:
        ValueError: another number of processes.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        layout.require(dist.get_world_size(), layout.latents)
        self.layout, self.device = layout, device
        shape = (layout.data, layout.latents)
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "latents"))
        assert dist.group.WORLD is not None
        self.place = Place(
            dist.group.WORLD, self.mesh.get_group("data"), self.mesh.get_group("latents")
        )
        self.rank = dist.get_rank()
        self._d_sae = 0
        self._offer = Offer()

    def another(self) -> Grid:
        """The same processes, for another SAE's run beside this one's."""
        other = copy(self)
        other._d_sae, other._offer = 0, Offer()
        return other

    @property
    def is_first(self) -> bool:
        """Rank 0."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """(rank, ranks): each reads its own part of every batch."""
        return self.rank, self.layout.processes

    def own(self, d_sae: int) -> tuple[int, int]:
        """Neighbouring features, the first ranks' first."""
        self._d_sae = d_sae
        return share_of(d_sae, self.place.latents_rank, self.layout.latents)

    def finder(self, find: Finder, features: int) -> Finder:
        """Own rows are found, then those of the other ranks are asked for."""
        first, _ = share_of(self._d_sae, self.place.latents_rank, self.layout.latents)
        return MergedFinder(self.place, find, features, first, self._offer)

    def decoded(self, decode: Callable[[SparseCodes], Tensor], codes: SparseCodes) -> Tensor:
        """Own rows are decoded and summed over features, then exchanged."""
        own = own_rows(codes.rows, self.place)
        result = decode(codes if self.layout.data == 1 else codes[own])
        if self.layout.latents > 1 and result.shape[0]:
            result = add_up(result.contiguous(), self.place.latents)
        return gather_rows(result, codes.rows, self.place)

    def total(self, value: Number, /) -> Number:
        """In order of ranks, so that all have the same last bit."""
        if self.layout.latents == 1:
            return value
        own = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        found = gather(own.reshape(1), self.place.latents).sum(0)[0]
        return found.to(value.dtype) if isinstance(value, Tensor) else type(value)(found)

    def before(self, value: int) -> int:
        """Of the ranks that have the features before own ones."""
        if self.layout.latents == 1:
            return 0
        found = gather(torch.tensor([value], device=self.device), self.place.latents)
        return int(found[: self.place.latents_rank].sum())

    def least(self, value: float) -> float:
        """Of all ranks that have other features."""
        if self.layout.latents == 1:
            return value
        own = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(gather(own, self.place.latents).min())

    def rows(self, rows: Tensor, left_out: int) -> tuple[Tensor, int]:
        """In order of ranks, which is that of the batch."""
        heads: list[list[int]] = gather(
            torch.tensor([rows.shape[0], left_out], device=self.device), self.place.world
        ).tolist()
        sizes = [size for size, _ in heads]
        every = gather_ragged(rows.to(self.device), sizes, self.place.world)
        return torch.cat(every), sum(number for _, number in heads)

    def agree(self, *told: bool) -> tuple[bool, ...]:
        """Over all ranks."""
        own = torch.tensor([int(one) for one in told], device=self.device)
        found: list[bool] = (gather(own, self.place.world) > 0).any(0).tolist()
        return tuple(found)

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's."""
        return broadcast(tensor.to(self.device).contiguous()).to(tensor.device)

    def pieces(self, tensor: Tensor, *, split: bool) -> Iterator[Tensor]:
        """One rank of each share sends its part, in the order of features."""
        if self.is_first:
            yield tensor.detach().cpu()
        if not split or self.place.data_rank:
            return
        row = max(1, tensor[:1].numel())
        step = max(1, _PIECE_NUMBERS // row)
        for rank in range(1, self.layout.latents):
            start, stop = share_of(self._d_sae, rank, self.layout.latents)
            for at in range(0, stop - start, step):
                size = min(step, stop - start - at)
                if self.is_first:
                    # On the CPU, whose backend there is beside a GPU's.
                    piece = torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype)
                    yield receive(piece, rank)
                elif self.rank == rank:
                    send(tensor[at : at + size].detach().cpu().contiguous(), 0)

    def require_equal(self, tensors: Iterable[Tensor]) -> None:
        """By checksums of what ranks with the same features have."""
        if self.layout.data == 1:
            return
        found = 0
        for tensor in tensors:
            own = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            found = zlib.crc32(own.numpy().data, found)
        sums: list[int] = gather(torch.tensor([found], device=self.device), self.place.data)[
            :, 0
        ].tolist()
        if len(set(sums)) > 1:
            ranks = dist.get_process_group_ranks(self.place.data)
            raise RuntimeError(
                f"ranks {ranks} train the same features but their weights have come apart "
                f"(checksums {sums}); are they the same kind of machine? The last checkpoint stands"
            )


def begin(device: torch.device, layout: Layout) -> None:
    """Joins the processes that torchrun (or any other launcher with its variables) has started."""
    # Both, so that checkpoints travel between CPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=layout.timeout_seconds))
