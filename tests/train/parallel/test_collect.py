"""Only a peer that is gone is called a lost rank."""

import subprocess
from collections.abc import Callable

import pytest
import torch.distributed as dist

from r1sae_fast.train.parallel.collect import is_of_a_lost_rank

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

# The first rank leaves; the other one waits for it, in a call that the layout tells.
LEAVING = r"""
import os, sys
import torch
import torch.distributed as dist
from r1sae_fast.errors import LostRankError
from r1sae_fast.train.parallel.collect import add_up, gather

layouts = [(1, 2), (2, 1)]
expected = None

def work(layout, rank, known):
    tensor, world = torch.zeros(3), dist.group.WORLD
    try:
        gather(tensor, world)  # it is there
        if rank == 0:
            os._exit(9)
        gather(tensor, world) if layout.data == 1 else add_up(tensor, world)
    except LostRankError:
        sys.exit(75)
"""


def test_a_peer_that_has_left(run_ranks: RunRanks) -> None:
    result = run_ranks(LEAVING)
    assert result.stdout.split("\n")[:-1] == ["statuses 9 75"] * 2, result.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("Broken pipe"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (dist.DistBackendError("NCCL error: CUDA out of memory"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
    ],
)
def test_which_errors_are(error: RuntimeError, expected: bool) -> None:
    assert is_of_a_lost_rank(error) is expected
