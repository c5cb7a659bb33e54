"""How a pass is run within a memory cap: whole blocks or groups of experts, and what it takes.

The ways, from the fastest machine's to the smallest's:

- whole blocks, the next one read while this one computes;
- expert groups: attention, router and shared expert of a block first, for as many micro-batches
  as fit with a running sum each (a chunk), then group after group of routed experts, each read
  once a chunk;
- either without reading ahead.

Under "w8a8" on a device without fp8 kernels each weight is dequantised once a block (a copy is
kept) or at every product. None of these choices changes a bit of the result. The quickest way
that fits, by the estimate, is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.layout import TensorSpec, block_specs, embedding_specs
from r1sae_fast.r1.moe import runs_every_expert
from r1sae_fast.r1.stream.arithmetic import (
    IsFp8,
    dense_bytes,
    dequantize_bytes,
    kept_bytes,
    r1_is_fp8,
    stored_bytes,
    work,
)
from r1sae_fast.r1.stream.sizes import show_size
from r1sae_fast.r1.stream.speeds import Speeds
from r1sae_fast.r1.stream.workspace import workspace_bytes

# Python and torch grow while they work: thread stacks, caches.
LIBRARIES = 32 << 20
# See r1sae_fast.r1.shapes. oneDNN keeps the products it used last.
_COMPILED, _MOST_COMPILED = 768 << 10, 1024
_PRODUCTS, _EXPERT_SIZES = 10, 24
_STEP = ("micro-batch", "one weight dequantised")
_TOKEN_BYTES = 96  # a token id in Python's lists, and its segment


@dataclass(frozen=True)
class Shape:
    """What a pass is made of.

    Attributes:
        tokens: of its sequences, padding not counted.
        batches: micro-batches as (sequences, padded length).
    """

    tokens: int
    batches: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Tokens with padding."""
        return sum(count * length for count, length in self.batches)

    @property
    def largest(self) -> int:
        """Rows of the largest micro-batch."""
        return max((count * length for count, length in self.batches), default=0)

    @property
    def context(self) -> int:
        """Mean length, a token's view."""
        return sum(n * length * length for n, length in self.batches) // max(self.rows, 1)


@dataclass(frozen=True)
class Model:
    """What is run: the model's shape, up to which layer, and how its weights are kept."""

    config: R1Config
    layer: int
    fp8: str = "w8a8"
    itemsize: int = 2
    is_fp8: IsFp8 = r1_is_fp8
    kernels: bool = False
    """Whether the device multiplies fp8 itself."""

    @property
    def dequantises(self) -> bool:
        """Whether weights are dequantised for their products (rather than as they are read)."""
        return self.fp8 == "w8a8" and not self.kernels

    def block(self, index: int) -> list[TensorSpec]:
        """The tensors of a block."""
        return list(_block(self.config, index))

    def is_moe(self, index: int) -> bool:
        """Whether a block is a mixture of experts."""
        return index >= self.config.first_k_dense_replace


@lru_cache(8)
def _block(config: R1Config, index: int) -> tuple[TensorSpec, ...]:
    return tuple(block_specs(config, index))


@dataclass(frozen=True)
class StreamPlan:
    """How a pass is run.

    Attributes:
        group: routed experts in memory at a time; None: whole blocks.
        ahead: the next weights are read while these compute.
        weight_cache: dequantise "once" a block or at every "call".
        chunk_rows: with groups, rows (padding included) with a running sum at a time.
        memory: bytes by part, at the peak; they add up to ``peak``.
        peak: of the whole process.
        read: bytes of weights read from the checkpoint.
        hidden: bytes of hidden states written to the disk between blocks and read back, which a
            system with memory to spare may keep in its cache.
        flops, dequantised: operations, and weights dequantised, in the pass.
        seconds: disk, compute, sums, and the whole.
    """

    shape: Shape
    group: int | None
    ahead: bool
    weight_cache: str
    chunk_rows: int
    chunks: int
    memory: dict[str, int]
    read: int
    hidden: int
    flops: float
    dequantised: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of the whole process."""
        return sum(self.memory.values())

    @property
    def step(self) -> int:
        """Bytes that a micro-batch may take anew, and a block's first use with it."""
        return sum(self.memory[name] for name in _STEP)

    @property
    def limit(self) -> str:
        """What the time goes to."""
        return max(("disk", "compute"), key=lambda name: self.seconds.get(name, 0.0))

    @property
    def tokens_per_second(self) -> float:
        """By the estimate."""
        return self.shape.tokens / max(self.seconds.get("whole", 0.0), 1e-9)


@dataclass(frozen=True)
class Budget:
    """Memory that is not the engine's to choose.

    Attributes:
        cap: bytes that the process may hold; None: as much as is asked for.
        base: held before the engine took anything (Python, torch).
        reserve: for the caller (a shard's buffer).
        hidden_in_memory: hidden states between blocks are kept in memory, not in a file.
    """

    cap: int | None
    base: int
    reserve: int = 0
    hidden_in_memory: bool = False


def make_plan(model: Model, shape: Shape, budget: Budget, speeds: Speeds) -> StreamPlan:
    """The quickest way that fits.

    Raises:
        ValueError: none does; the smallest cap that would do is named.
    """
    plans = [_timed(plan, model, speeds) for plan in candidates(model, shape, budget)]
    fitting = [plan for plan in plans if budget.cap is None or plan.peak <= budget.cap]
    if not fitting:
        least = min(plans, key=lambda plan: plan.peak)
        parts = ", ".join(f"{name} {show_size(size)}" for name, size in least.memory.items())
        sequences, length = max(shape.batches, key=lambda batch: batch[0] * batch[1])
        instead = "make the batches smaller (--batch-size)"
        if sequences == 1:
            instead = "shorten the texts that are so long"
        raise ValueError(
            f"the memory cap of {show_size(budget.cap or 0)} is too small: at least "
            f"{_round_up(least.peak)} is needed for batches of {sequences} sequences of up to "
            f"{length} tokens ({parts}); raise --max-memory, or {instead}"
        )
    return min(fitting, key=lambda plan: (plan.seconds["whole"], plan.peak))


def _round_up(size: int) -> str:
    """A cap that can be typed, not below ``size``."""
    return f"{-(-size // 10**6)}MB"


def candidates(model: Model, shape: Shape, budget: Budget) -> Iterator[StreamPlan]:
    """Every way worth a look that gives the resident engine's bits, whether it fits or not."""
    config = model.config
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    mixtures = any(model.is_moe(index) for index in range(model.layer + 1))
    caches = ["call"]
    if model.dequantises:
        caches = ["once", "call"]
    if mixtures and any(runs_every_expert(n * length, experts, k) for n, length in shape.batches):
        # A model as small as TinyR1, a batch of a few tokens.
        caches, mixtures = caches[:1], False
    for ahead in (True, False):
        for cache in caches:
            yield _whole(model, shape, budget, ahead, cache)
            if mixtures:
                for size in sorted({-(-experts // parts) for parts in _divisions(experts)}):
                    yield _groups(model, shape, budget, ahead, cache, size)


def _divisions(experts: int) -> Iterator[int]:
    parts = 2
    while parts < experts:
        yield parts
        parts += max(parts // 2, 1)
    yield experts


def _common(model: Model, shape: Shape, budget: Budget) -> dict[str, int]:
    """Memory that every way needs."""
    row = model.config.hidden_size * model.itemsize
    blocks = [model.block(index) for index in sorted({0, model.layer})]
    largest = max(dequantize_bytes(specs, model.itemsize, model.is_fp8) for specs in blocks)
    workspace = workspace_bytes(model.config, model.fp8, model.itemsize, shape.largest)
    return {
        "Python and torch": budget.base + LIBRARIES + _compiled_bytes(model, shape),
        "caller's buffers": budget.reserve + 3 * row * shape.largest + _TOKEN_BYTES * shape.tokens,
        "hidden states": row * (shape.rows if budget.hidden_in_memory else 4 * shape.largest),
        _STEP[0]: workspace,
        _STEP[1]: 0 if model.kernels else largest,
    }


def _compiled_bytes(model: Model, shape: Shape) -> int:
    """Of bf16 products that torch compiles, on CPUs: a block's for each form of a micro-batch,
    an expert's two for some numbers of rows."""
    if model.kernels or model.itemsize != 2:
        return 0
    count = _PRODUCTS * len(set(shape.batches)) + 2 * _EXPERT_SIZES
    return _COMPILED * min(count, _MOST_COMPILED)


def _whole(model: Model, shape: Shape, budget: Budget, ahead: bool, cache: str) -> StreamPlan:
    kinds = _kinds(model)
    kept = [_kept(model, specs) for specs, _ in kinds]
    pairs = [min(count, 2) * size for size, (_, count) in zip(kept, kinds, strict=True)]
    weights = max(*pairs, sum(kept)) if ahead and len(kept) > 1 else max(kept)
    if ahead and len(kept) == 1:
        weights = pairs[0]
    copies = max(_dense(model, specs) for specs, _ in kinds) if cache == "once" else 0
    times = 1 if cache == "once" else len(shape.batches)
    return StreamPlan(
        shape=shape,
        group=None,
        ahead=ahead,
        weight_cache=cache,
        chunk_rows=shape.rows,
        chunks=1,
        memory={
            **_common(model, shape, budget),
            "weights": weights,
            "dequantised weights": copies,
        },
        read=_read(model, 1),
        hidden=_hidden(model, shape, budget),
        flops=shape.rows * work(model.config, model.layer, shape.context).flops,
        dequantised=times * _fp8_numbers(model) if model.dequantises else 0,
    )


def _groups(
    model: Model, shape: Shape, budget: Budget, ahead: bool, cache: str, size: int
) -> StreamPlan:
    config, copies_of = model.config, 2 if ahead else 1
    specs = model.block(model.layer)
    rest = [spec for spec in specs if spec.expert is None]
    group = [spec for spec in specs if spec.expert is not None and spec.expert < size]
    weights = copies_of * (_kept(model, rest) + _kept(model, group))
    copies = _dense(model, rest) + _dense(model, group)
    if config.first_k_dense_replace:
        first = model.block(0)
        weights = max(weights, copies_of * _kept(model, first))
        copies = max(copies, _dense(model, first))
    common = _common(model, shape, budget)
    # Of the input a chunk keeps the sum after attention, and what it gathers for the experts.
    row = config.hidden_size * (model.itemsize + 4) + 24 * config.num_experts_per_tok
    used = sum(common.values()) + weights + (copies if cache == "once" else 0)
    room = shape.rows if budget.cap is None else max((budget.cap - used) // row, 0)
    chunk = min(max(room, shape.largest), shape.rows)
    chunks = count_chunks(shape.batches, chunk)
    times = chunks if cache == "once" else len(shape.batches)
    return StreamPlan(
        shape=shape,
        group=size,
        ahead=ahead,
        weight_cache=cache,
        chunk_rows=chunk,
        chunks=chunks,
        memory={
            **common,
            "weights": weights,
            "dequantised weights": copies if cache == "once" else 0,
            "experts' running sums": row * chunk,
        },
        read=_read(model, chunks),
        hidden=_hidden(model, shape, budget),
        flops=shape.rows * work(config, model.layer, shape.context).flops,
        dequantised=times * _fp8_numbers(model) if model.dequantises else 0,
    )


def split_chunks(batches: Sequence[tuple[int, int]], rows: int) -> list[range]:
    """Consecutive micro-batches (by number) of together at most ``rows`` rows, at least one."""
    chunks: list[range] = []
    begin = total = 0
    for number, (count, length) in enumerate(batches):
        if total and total + count * length > rows:
            chunks.append(range(begin, number))
            begin, total = number, 0
        total += count * length
    return [*chunks, range(begin, len(batches))]


def count_chunks(batches: Sequence[tuple[int, int]], rows: int) -> int:
    """Of :func:`split_chunks`."""
    return len(split_chunks(batches, rows))


def _timed(plan: StreamPlan, model: Model, speeds: Speeds) -> StreamPlan:
    mixtures = sum(model.is_moe(index) for index in range(model.layer + 1))
    config, rows = model.config, plan.shape.rows
    expert_flops = 6.0 * config.hidden_size * config.moe_intermediate_size
    expert_flops *= rows * mixtures * config.num_experts_per_tok
    compute = expert_flops / speeds.expert_flops
    compute += max(plan.flops - expert_flops, 0) / speeds.flops
    compute += plan.dequantised / speeds.dequantize
    if model.fp8 == "dequantize":  # while the weights are read
        compute += _fp8_numbers(model) * plan.chunks / speeds.dequantize
    groups = 1 if plan.group is None else -(-config.n_routed_experts // plan.group)
    compute += rows * config.hidden_size * 8 * groups * mixtures / speeds.memory
    disk = (plan.read + plan.hidden) / speeds.disk
    whole = max(disk, compute) if plan.ahead else disk + compute
    plan.seconds.update(disk=disk, compute=compute, whole=whole)
    return plan


def _kinds(model: Model) -> list[tuple[list[TensorSpec], int]]:
    """A block of each kind, and how many there are."""
    dense = min(model.config.first_k_dense_replace, model.layer + 1)
    kinds = []
    if dense:
        kinds.append((model.block(0), dense))
    if dense <= model.layer:
        kinds.append((model.block(model.layer), model.layer + 1 - dense))
    return kinds


def _kept(model: Model, specs: Sequence[TensorSpec]) -> int:
    return kept_bytes(specs, model.fp8, model.itemsize, model.is_fp8)


def _dense(model: Model, specs: Sequence[TensorSpec]) -> int:
    return dense_bytes(specs, model.fp8, model.itemsize, model.is_fp8)


def _fp8_numbers(model: Model) -> int:
    """Weights of all blocks that are stored in fp8."""
    return sum(
        count * dense_bytes(specs, "w8a8", 1, model.is_fp8) for specs, count in _kinds(model)
    )


def _read(model: Model, chunks: int) -> int:
    """Weights read in a pass: routed experts once a chunk, all else once."""
    total = stored_bytes(embedding_specs(model.config), model.is_fp8)
    for specs, count in _kinds(model):
        experts = [spec for spec in specs if spec.expert is not None]
        rest = [spec for spec in specs if spec.expert is None]
        once = stored_bytes(rest, model.is_fp8)
        total += count * (once + chunks * stored_bytes(experts, model.is_fp8))
    return total


def _hidden(model: Model, shape: Shape, budget: Budget) -> int:
    if budget.hidden_in_memory:
        return 0
    return 2 * model.layer * shape.rows * model.config.hidden_size * model.itemsize
