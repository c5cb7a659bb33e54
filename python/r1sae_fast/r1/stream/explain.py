"""A pass's plan in words."""

from __future__ import annotations

from collections.abc import Iterator

from r1sae_fast.r1.stream.plan import StreamPlan
from r1sae_fast.r1.stream.sizes import show_size, show_time


def plan_lines(plan: StreamPlan) -> Iterator[str]:
    """What is read, held and computed, and how long that takes by the measured speeds."""
    shape = plan.shape
    longest = max(length for _, length in shape.batches)
    yield (
        f"pass: {shape.tokens:,} tokens in {len(shape.batches):,} batches of up to {longest:,} "
        f"tokens a sequence ({shape.rows:,} with padding)"
    )
    if plan.group is None:
        way = "whole blocks"
    else:
        times = "once" if plan.chunks == 1 else f"{plan.chunks} times"
        way = f"{plan.group} routed experts at a time, each read {times}"
    reading = "the next read while one computes" if plan.ahead else "read and computed in turns"
    cache = "once a block" if plan.weight_cache == "once" else "at every product"
    dequantised = f"; fp8 dequantised {cache}" if plan.dequantised else ""
    yield f"weights: {way}, {reading}{dequantised}"
    parts = [f"{name} {show_size(size)}" for name, size in plan.memory.items() if size]
    yield f"memory: at most {show_size(plan.peak)} = {' + '.join(parts)}"
    disk, compute = plan.seconds["disk"], plan.seconds["compute"]
    yield (
        f"disk: {show_size(plan.read)} of weights read, {show_size(plan.hidden)} of hidden states "
        f"written and read: {show_time(disk)}"
    )
    yield f"compute: {plan.flops:.3g} operations: {show_time(compute)}"
    yield (
        f"about {show_time(plan.seconds['whole'])}, {plan.tokens_per_second:,.1f} tokens/s; "
        f"the limit is {plan.limit}"
    )
