"""Starts the processes of a run on this machine, by torch's own elastic launcher."""

from __future__ import annotations

import math
import os
import sys
import uuid
from signal import SIGTERM

from r1sae_fast.errors import LostRankError

__all__ = ["LOST", "launch"]

LOST = 75
"""Exit status of a rank that lost another one: it isn't the one that failed."""


def launch(arguments: list[str], processes: int, timeout_seconds: float = 1800.0) -> int:
    """Runs ``python ARGUMENTS`` in so many processes on this machine, and waits for them.

    What they share of the cores is set by ``OMP_NUM_THREADS``, unless that is set already. When
    told to stop, they have ``timeout_seconds``, 300 at most, to save in (or what
    ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` says); who needs longer is killed, and the checkpoint before
    stands.

    Returns:
        0, or 143 where they were told to stop and have saved.

    Raises:
        LostRankError: a process failed or was killed (it is named); the others were ended.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    # Torch would kill them after 30 s: a wide SAE's checkpoint takes longer. But a rank that hangs
    # because another one failed waits as long. By the variable, since not every version's
    # LaunchConfig has a field for it.
    grace = math.ceil(min(timeout_seconds, 300.0))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        role="r1sae",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as told:
        return 128 + int(told.sigval)
    except ChildFailedError as error:
        statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if all(status in (128 + SIGTERM, LOST) for status in statuses.values()) and (
            128 + SIGTERM in statuses.values()
        ):
            return 128 + SIGTERM
        # Who lost another one, or was ended by the launcher for it, is not to blame.
        blamed = [
            rank for rank, status in sorted(statuses.items()) if status not in (LOST, -SIGTERM)
        ] or sorted(statuses)
        told_of = "; ".join(
            f"rank {rank} of {processes} {_ending(statuses[rank])}" for rank in blamed
        )
        raise LostRankError(
            f"{told_of}: all were ended; the last checkpoint stands, the same command goes on "
            "from it"
        ) from None
    return 0


def _ending(status: int) -> str:
    if status >= 0:
        return f"failed with exit status {status}"
    from signal import Signals

    try:
        return f"was ended by {Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
