"""The few collective operations that are needed, on tensors of any size and dtype.

A peer that is gone shows as :class:`LostRankError`, whatever the backend says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from r1sae_fast.errors import LostRankError

Group = dist.ProcessGroup

_SIGNS = ("connection closed", "reset", "timed out", "timeout", "broken pipe", "socket", "gloo")
"""In the first line of what gloo raises, a plain RuntimeError, when a peer is gone or silent."""


def gather(tensor: Tensor, group: Group) -> Tensor:
    """``[ranks, ...]``: each rank's tensor, all of one shape."""
    count = dist.get_world_size(group)
    own = _bytes(tensor)
    found = own.new_empty((count * own.shape[0],))
    with _lost(group):
        dist.all_gather_into_tensor(found, own, group=group)
    return found.view(tensor.dtype).view(count, *tensor.shape)


def gather_ragged(tensor: Tensor, sizes: list[int], group: Group) -> list[Tensor]:
    """Each rank's tensor ``[size, ...]``, of whose sizes all ranks know."""
    most = max(sizes)
    if most == 0:
        return [tensor[:0]] * len(sizes)
    padded = tensor
    if tensor.shape[0] < most:
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
    found = gather(padded, group)
    return [found[rank, :size] for rank, size in enumerate(sizes)]


def add_up(tensor: Tensor, group: Group) -> Tensor:
    """The sum over ranks, in place; the same to the bit on all of them."""
    with _lost(group):
        dist.all_reduce(tensor, group=group)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """The first rank's, in place."""
    with _lost(None):
        dist.broadcast(tensor, 0)
    return tensor


def send(tensor: Tensor, to: int) -> None:
    """To the rank ``to``, which receives it."""
    with _lost(None):
        dist.send(tensor, to)


def receive(tensor: Tensor, source: int) -> Tensor:
    """Into ``tensor``, from the rank ``source``, which sends it."""
    with _lost(None):
        dist.recv(tensor, source)
    return tensor


def is_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether a backend says by it that a peer is gone, and not, say, that memory has run out."""
    # What torch calls an error of a backend may be one of memory, where NCCL allocates.
    text = str(error).strip().split("\n")[0].lower()
    if "out of memory" in text:
        return False
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or any(sign in text for sign in _SIGNS)


def _bytes(tensor: Tensor) -> Tensor:
    # Not every backend knows every dtype.
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@contextmanager
def _lost(group: Group | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_of_a_lost_rank(error):
            raise
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        first = str(error).strip().split("\n")[0]
        raise LostRankError(
            f"rank {dist.get_rank()} lost one of the ranks {ranks} ({first}); "
            "the last checkpoint stands, the same command goes on from it"
        ) from error
