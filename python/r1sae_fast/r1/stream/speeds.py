"""What this machine does, measured in a second or two: disk, products, dequantisation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from r1sae_fast.r1.act_quant import fake_quantize_activations
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import FP8_DTYPE, dequantize_blocks, scale_shape

_PIECE = 4 << 20
_SECONDS = 0.2


@dataclass(frozen=True)
class Speeds:
    """Attributes:
    disk: bytes a second, weights read from where the checkpoint is.
    flops: operations a second of dense products.
    expert_flops: the same of an expert's, on as many rows as it gets of a micro-batch.
    dequantize: weights a second from fp8 to the engine's dtype.
    quantize: activations a second rounded to fp8 and back.
    memory: bytes a second of running sums read and written; not measured.
    """

    disk: float
    flops: float
    expert_flops: float
    dequantize: float
    quantize: float = 1e9
    memory: float = 4e9


def measure(
    directory: Path, config: R1Config, dtype: torch.dtype, device: torch.device, tokens: int
) -> Speeds:
    """Short probes with the shapes of this model; ``tokens`` of a micro-batch."""
    width, inter = config.hidden_size, config.moe_intermediate_size
    rows = max(tokens * config.num_experts_per_tok // config.n_routed_experts, 1)
    return Speeds(
        disk=disk_speed(directory),
        flops=product_speed(min(tokens, 2048), width, min(width, 2048), dtype, device),
        expert_flops=product_speed(min(rows, 2048), width, 2 * inter, dtype, device),
        dequantize=dequantize_speed(2 * inter, width, dtype, device),
        quantize=quantize_speed(min(tokens, 2048), width, dtype, device),
    )


def disk_speed(directory: Path) -> float:
    """Bytes a second of a checkpoint's shards, pieces from all over them. What the system has
    in its cache is read as fast as it will be in the run."""
    shards = sorted(directory.glob("*.safetensors"))
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
    return 2.0 * rows * inputs * outputs * _rate(lambda: F.linear(x, weight), device)


def dequantize_speed(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Weights a second."""
    weight = torch.zeros(rows, columns, dtype=FP8_DTYPE, device=device)
    scales = torch.ones(scale_shape((rows, columns)), device=device)
    return rows * columns * _rate(lambda: dequantize_blocks(weight, scales, dtype), device)


def quantize_speed(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> float:
    """Activations a second."""
    x = torch.ones(rows, channels, dtype=dtype, device=device)
    return rows * channels * _rate(lambda: fake_quantize_activations(x), device)


def _rate(call: Callable[[], object], device: torch.device) -> float:
    """Calls a second, the best of the probe: others may be at work on the machine."""
    best, spent = float("inf"), 0.0
    call()
    while spent < _SECONDS:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - begin
        best, spent = min(best, took), spent + took
    return 1 / max(best, 1e-9)
