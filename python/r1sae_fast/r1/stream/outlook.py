"""Three ways to a model's residuals on machines that are given by their numbers: all weights in
memory, streamed from the disk, spread over GPUs. Each with the arithmetic that it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.layout import block_specs, embedding_specs, model_specs
from r1sae_fast.r1.stream.arithmetic import IsFp8, kept_bytes, model_bytes, stored_bytes, work
from r1sae_fast.r1.stream.explain import plan_lines
from r1sae_fast.r1.stream.plan import LIBRARIES, Budget, Model, Shape, make_plan
from r1sae_fast.r1.stream.sizes import show_size
from r1sae_fast.r1.stream.speeds import Speeds
from r1sae_fast.r1.stream.workspace import workspace_bytes

_DAY = 86400.0
_BASE = 400 << 20  # of a process that has imported torch


@dataclass(frozen=True)
class Machine:
    """Attributes:
    memory: bytes where the products are computed.
    disk: bytes a second that weights are read with.
    flops: operations a second that products reach (not a data sheet's peak).
    kernels: whether fp8 is multiplied as it is; else weights are dequantised first.
    dequantize: weights a second, where they are.
    """

    memory: int
    disk: float
    flops: float
    kernels: bool = True
    dequantize: float = 2e9


@dataclass(frozen=True)
class Gpus:
    """Attributes:
    count: of them.
    memory: bytes of each.
    flops: peak of each, fp8 without sparsity.
    utilisation: part of the peak that a served model reaches.
    """

    count: int = 8
    memory: int = 141 * 10**9
    flops: float = 1979e12
    utilisation: float = 0.09


@dataclass(frozen=True)
class Way:
    """One of the three.

    Attributes:
        name: resident, streaming or so many GPUs.
        tokens_per_second: None where it does not fit.
        limit: memory, disk or compute.
        lines: the arithmetic.
        numbers: the same, to be read by programs.
    """

    name: str
    tokens_per_second: float | None
    limit: str
    lines: tuple[str, ...]
    numbers: dict[str, Any]

    def days(self, tokens: float) -> float | None:
        """For so many tokens."""
        rate = self.tokens_per_second
        return None if rate is None else tokens / rate / _DAY


@dataclass(frozen=True)
class Task:
    """What is to be harvested.

    Attributes:
        config, is_fp8: the model, and which of its tensors are stored in fp8.
        layer: residual stream after this block.
        context: tokens a sequence.
        pass_tokens: with streaming, for which the weights are read once.
        batch: sequences that go through a block together.
        bytes_on_disk: of the embedding and blocks 0 to ``layer``; default by the config.
    """

    config: R1Config
    is_fp8: IsFp8
    layer: int
    context: int = 4096
    pass_tokens: int = 2**20
    batch: int = 1
    bytes_on_disk: int | None = None

    @property
    def weights(self) -> int:
        """Bytes on disk."""
        if self.bytes_on_disk is not None:
            return self.bytes_on_disk
        return model_bytes(self.config, self.layer, self.is_fp8)

    @property
    def shape(self) -> Shape:
        """Of a pass."""
        count = max(-(-self.pass_tokens // (self.batch * self.context)), 1)
        batches = ((self.batch, self.context),) * count
        return Shape(count * self.batch * self.context, batches)


def model_lines(task: Task) -> tuple[str, ...]:
    """What the model weighs and works."""
    config, layer = task.config, task.layer
    last = config.num_hidden_layers - 1
    part, whole = work(config, layer, task.context), work(config, last, task.context)
    every = stored_bytes(model_specs(config), task.is_fp8)
    row = 2 * config.hidden_size
    heads, widths = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    return (
        f"on disk: embedding and blocks 0-{layer}: {show_size(task.weights)} "
        f"(the whole model {show_size(every)})",
        f"active weights a token: {part.weights / 1e9:.4g} B of blocks 0-{layer} "
        f"({whole.weights / 1e9:.4g} B of all {last + 1})",
        f"work a token: 2 x {part.weights / 1e9:.4g}e9 + attention {layer + 1} blocks x 2 x "
        f"{heads} heads x {widths} x {(task.context + 1) / 2:,.1f} keys = "
        f"{part.flops / 1e9:.4g} GFLOP ({1 - part.flops / whole.flops:.0%} less than all blocks)",
        f"a residual: {row:,} B in bf16; a billion tokens {show_size(row * 1e9)}",
    )


def resident(task: Task, machine: Machine) -> Way:
    """All weights in memory."""
    blocks = range(task.layer + 1)
    kept = kept_bytes(embedding_specs(task.config), "w8a8", 2, task.is_fp8)
    kept += sum(
        kept_bytes(block_specs(task.config, index), "w8a8", 2, task.is_fp8) for index in blocks
    )
    rows = task.batch * task.context
    needed = kept + workspace_bytes(task.config, "w8a8", 2, rows) + _BASE + LIBRARIES
    lines = [
        f"memory: weights {show_size(kept)}, with a batch of {rows:,} tokens {show_size(needed)}"
    ]
    numbers: dict[str, Any] = {"bytes_needed": needed, "bytes_given": machine.memory}
    if needed > machine.memory:
        lines.append(
            f"does not fit in {show_size(machine.memory)}: "
            f"{needed / machine.memory:.1f} times as much is needed"
        )
        return Way("resident", None, "memory", tuple(lines), numbers)
    flops = work(task.config, task.layer, task.context).flops
    rate = machine.flops / flops
    lines.append(
        f"{machine.flops / 1e12:.4g} TFLOP/s / {flops / 1e9:.4g} GFLOP = {rate:,.1f} tokens/s"
    )
    if not machine.kernels:
        # Kept in fp8, weights are dequantised for every batch.
        specs = [spec for index in blocks for spec in block_specs(task.config, index)]
        count = sum(math.prod(spec.shape) for spec in specs if task.is_fp8(spec))
        compute, more = rows / rate, count / machine.dequantize
        rate = rows / (compute + more)
        lines.append(
            f"without fp8 kernels, for each batch of {rows:,} tokens ({compute:,.1f} s) "
            f"{count / 1e9:,.1f}e9 weights are dequantised at {machine.dequantize / 1e9:.4g}e9 a "
            f"second ({more:,.1f} s): {rate:,.1f} tokens/s"
        )
    return Way("resident", rate, "compute", tuple(lines), numbers)


def streaming(task: Task, machine: Machine) -> Way:
    """Weights read from the disk, block by block."""
    speeds = Speeds(
        disk=machine.disk,
        flops=machine.flops,
        expert_flops=machine.flops,
        dequantize=machine.dequantize,
        memory=5e11 if machine.kernels else 4e9,
    )
    model = Model(task.config, task.layer, is_fp8=task.is_fp8, kernels=machine.kernels)
    try:
        plan = make_plan(model, task.shape, Budget(machine.memory, _BASE), speeds)
    except ValueError as error:
        return Way("streaming", None, "memory", (str(error),), {"error": str(error)})
    flops = work(task.config, task.layer, task.context).flops
    balance = machine.flops * task.weights / machine.disk / flops
    lines = [
        *plan_lines(plan),
        f"scratch file: {show_size(plan.hidden / max(task.layer, 1))}",
        f"read once, the weights take the disk as long as {balance:,.0f} tokens take to compute: "
        "in smaller passes the disk is the limit",
    ]
    numbers = {
        "pass_tokens": plan.shape.tokens,
        "bytes_read_a_pass": plan.read,
        "hidden_bytes_a_pass": plan.hidden,
        "flops_a_pass": plan.flops,
        "seconds_a_pass": plan.seconds,
        "peak_memory": plan.peak,
        "memory": plan.memory,
        "experts_at_a_time": plan.group,
        "times_experts_are_read": plan.chunks,
        "read_ahead": plan.ahead,
        "weight_cache": plan.weight_cache,
    }
    return Way("streaming", plan.tokens_per_second, plan.limit, tuple(lines), numbers)


def on_gpus(task: Task, gpus: Gpus) -> Way:
    """Spread over GPUs that hold all weights, as servers of the whole model run it."""
    name = f"{gpus.count} GPUs"
    memory = gpus.count * gpus.memory
    lines = [f"memory: {gpus.count} x {show_size(gpus.memory)} = {show_size(memory)}"]
    numbers: dict[str, Any] = {"bytes_needed": task.weights, "bytes_given": memory}
    if task.weights > memory:
        lines.append(f"too little for {show_size(task.weights)} of weights")
        return Way(name, None, "memory", tuple(lines), numbers)
    flops = work(task.config, task.layer, task.context).flops
    reached = gpus.count * gpus.flops * gpus.utilisation
    rate = reached / flops
    lines.append(
        f"{gpus.count} x {gpus.flops / 1e12:,.0f} TFLOP/s x {gpus.utilisation:.0%} reached = "
        f"{reached / 1e12:,.0f} TFLOP/s; / {flops / 1e9:.4g} GFLOP = {rate:,.0f} tokens/s"
    )
    return Way(name, rate, "compute", tuple(lines), numbers)
