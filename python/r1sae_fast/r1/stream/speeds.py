"""What this machine does, measured in short probes: disk, products, dequantisation."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from r1sae_fast.r1.fp8 import FP8_DTYPE, dequantize_blocks, scale_shape
from r1sae_fast.r1.memory import available_memory

_PIECE = 4 << 20
_SECONDS = 0.2
_COLD = 32 << 20  # more bytes than caches near the cores hold


@dataclass(frozen=True)
class Speeds:
    """Attributes:
    disk: bytes a second, weights read from where the checkpoint is.
    flops: operations a second of a block without its routed experts, all that stands between
        its products included.
    expert_flops: the same of an expert, on as many rows as it gets of a micro-batch.
    dequantize: weights a second from fp8 to the engine's dtype.
    memory: bytes a second of running sums read and written, what is done to a micro-batch for
        each group of experts included.
    """

    disk: float
    flops: float
    expert_flops: float
    dequantize: float
    memory: float = 4e9


def disk_speed(directory: Path) -> float:
    """Bytes a second of a checkpoint's shards, pieces from all over them. What the system has
    in its cache is read as fast as it will be in the run; of a checkpoint that is larger than
    memory nothing will be, and the pieces are dropped from the cache first."""
    shards = sorted(directory.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    drop = hasattr(os, "posix_fadvise") and size > (available_memory() or size)
    pieces = [
        (shard, start)
        for shard in shards
        for start in range(0, max(shard.stat().st_size - _PIECE, 1), 16 * _PIECE)
    ]
    pieces = pieces[:: max(len(pieces) // 64, 1)]
    buffer = bytearray(_PIECE)
    total, begin = 0, time.perf_counter()
    for shard, start in pieces:
        with shard.open("rb", buffering=0) as file:
            file.seek(start)
            if drop:
                os.posix_fadvise(file.fileno(), start, _PIECE, os.POSIX_FADV_DONTNEED)
            total += file.readinto(buffer) or 0
        if time.perf_counter() - begin > 5 * _SECONDS:
            break
    return max(total, 1) / max(time.perf_counter() - begin, 1e-9)


def product_speed(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Operations a second of [rows, inputs] by [outputs, inputs] transposed."""
    x = torch.zeros(rows, inputs, dtype=dtype, device=device)
    weight = torch.zeros(outputs, inputs, dtype=dtype, device=device)
    return 2.0 * rows * inputs * outputs * rate_of(lambda: F.linear(x, weight), device)


def dequantize_speed(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Weights a second, of weights that are in no cache."""
    count = max(_COLD // (rows * columns), 1)
    weights = torch.zeros(count, rows, columns, dtype=FP8_DTYPE, device=device)
    scales = torch.ones(scale_shape((rows, columns)), device=device)
    turns = itertools.cycle(weights)
    rate = rate_of(lambda: dequantize_blocks(next(turns), scales, dtype), device)
    return rows * columns * rate


def rate_of(call: Callable[[], object], device: torch.device) -> float:
    """Calls a second, by the median time of a fifth of a second, at least three calls."""
    times: list[float] = []
    call()
    while sum(times) < _SECONDS or len(times) < 3:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return 1 / max(statistics.median(times), 1e-9)
