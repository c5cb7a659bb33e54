"""The streaming engine from the options of a command; its plan on stderr before each pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from r1sae_fast.r1.blocks import Fp8Mode
    from r1sae_fast.r1.engines.stream import StreamEngine, StreamProgress
    from r1sae_fast.r1.stream.plan import StreamPlan


def open_stream_engine(
    model: str,
    *,
    dtype: torch.dtype,
    fp8: Fp8Mode,
    device: str,
    max_memory: str | None,
    pass_tokens: int | None,
    scratch: Path,
    rows_per_shard: int,
    note: Callable[[str], None],
) -> StreamEngine:
    """For one run of a command, which ``note`` tells what is under way.

    Raises:
        ValueError: ``max_memory`` is no size.
        FileNotFoundError, CheckpointError: as :class:`StreamEngine`.
    """
    from r1sae_fast.r1.engines.stream import PASS_TOKENS, StreamEngine, shard_buffer_bytes
    from r1sae_fast.r1.stream.sizes import parse_size

    cap = None if max_memory is None else parse_size(max_memory)

    def progress(now: StreamProgress) -> None:
        note(f"block {now.block} of 0-{now.blocks - 1}, batch {now.batch} of {now.batches}")

    engine = StreamEngine(
        model,
        dtype,
        device,
        fp8=fp8,
        max_memory=cap,
        pass_tokens=PASS_TOKENS if pass_tokens is None else pass_tokens,
        scratch=scratch,
        on_plan=show_plan,
        on_progress=progress,
    )
    engine.reserve = shard_buffer_bytes(rows_per_shard, engine.hidden_size, dtype.itemsize)
    return engine


def show_plan(plan: StreamPlan) -> None:
    """Prints a pass's plan on stderr."""
    from rich.console import Console

    from r1sae_fast.r1.stream.explain import plan_lines

    console = Console(stderr=True)
    for line in plan_lines(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
