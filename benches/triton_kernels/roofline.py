"""The least time each operation can take on a GPU, from its bytes and arithmetic.

    python benches/triton_kernels/roofline.py [--markdown FILE]

Computed, not measured: bytes / bandwidth or operations / peak rate, whichever is longer, with the
peers' work counted the same way. Real kernels reach 60 to 90 % of this; the ratios between columns
are what to read.

Floors count global memory and arithmetic. A second set of columns also counts what gathers read
from the L2 cache (every code reads a row of the weights), which is the longer of the two for
decoding and for exact products: a bound that no arrangement of these kernels passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r1sae_fast.triton_kernels.decode import decode_traffic
from r1sae_fast.triton_kernels.encode_gemm import encode_chunk_traffic
from r1sae_fast.triton_kernels.encode_topk import select_topk_traffic
from r1sae_fast.triton_kernels.int8_screen import int8_screen_traffic
from r1sae_fast.triton_kernels.sparse_grad import (
    gradient_of_values_traffic,
    gradient_of_weight_traffic,
)
from r1sae_fast.triton_kernels.traffic import Traffic

D_IN, D_SAE, K = 7168, 28672, 64
ROWS = (512, 1024, 4096, 8192, 32768)


@dataclass(frozen=True)
class Device:
    """Sustained rates: vendors' dense peaks times what large products reach, in TFLOP/s, TB/s."""

    name: str
    half: float
    int8: float
    float32: float
    bandwidth: float
    cache: float
    """TB/s that all multiprocessors together read from the L2 cache (MI300X: Infinity Cache);
    published microbenchmarks, B200's assumed."""


# Dense peaks from the data sheets, times 0.8; bandwidth times 0.9.
DEVICES = (
    Device("H100", 0.8 * 989, 0.8 * 1979, 0.8 * 67, 0.9 * 3.35, 5.5),
    Device("H200", 0.8 * 989, 0.8 * 1979, 0.8 * 67, 0.9 * 4.8, 5.5),
    Device("B200", 0.8 * 2250, 0.8 * 4500, 0.8 * 80, 0.9 * 8.0, 9.0),
    Device("A100", 0.8 * 312, 0.8 * 624, 0.8 * 19.5, 0.9 * 2.04, 4.0),
    Device("MI300X", 0.8 * 1307, 0.8 * 2615, 0.8 * 163, 0.9 * 5.3, 11.0),
)


Kernels = tuple[Traffic, ...]


def milliseconds(
    kernels: Kernels, rate: float, device: Device, *, with_cache: bool = False
) -> float:
    """Floor of kernels one after another: within each, memory and arithmetic overlap.

    ``with_cache`` counts reads from the L2 cache too, but for products: how often those read a tile
    is in the share of the peak that they reach.
    """

    def floor(kernel: Traffic) -> float:
        gathers = kernel.flops < 100 * kernel.hbm
        cached = kernel.l2_read / (device.cache * 1e12) if with_cache and gathers else 0.0
        return max(kernel.flops / (rate * 1e12), kernel.hbm / (device.bandwidth * 1e12), cached)

    return sum(1e3 * floor(kernel) for kernel in kernels)


def product(rows: int, size: int) -> Traffic:
    """One dense product that writes [rows, d_sae], or reads it."""
    return Traffic(
        (D_IN * D_SAE + rows * D_IN) * size, rows * D_SAE * size, flops=2.0 * rows * D_IN * D_SAE
    )


def dense_forward(rows: int, size: int) -> Kernels:
    """torch as released: dense pre-activations, relu, a top-k over them, scatter into zeros, dense
    decode."""
    codes = rows * D_SAE * size
    return product(rows, size), Traffic(4 * codes, 2 * codes), product(rows, size)


def sparsify_forward(rows: int, size: int) -> Kernels:
    """sparsify: dense pre-activations, relu and top-k, gathered decode without tiling."""
    weights, codes = D_IN * D_SAE * size, rows * D_SAE * size
    # A gather by rows misses a cache of 50 MB as often as the weights don't fit it.
    missed = max(0.0, 1 - 50e6 / weights)
    asked = rows * K * D_IN * size
    gathered = min(rows * K, D_SAE) * D_IN * size + missed * asked
    decode = Traffic(gathered, rows * D_IN * size, asked)
    return product(rows, size), Traffic(3 * codes, codes), decode


def flex_forward(rows: int, size: int) -> Kernels:
    """flex-sae's decoder (by tiles of columns, as ours) behind torch's encoder: it has none."""
    tiled = decode_traffic(rows, K, D_SAE, D_IN, value_bytes=size, weight_bytes=size)
    return (*sparsify_forward(rows, size)[:2], tiled)


def ours(rows: int, size: int) -> Kernels:
    """Encoding, selection, decoding."""
    return (
        encode_chunk_traffic(rows, D_IN, D_SAE, itemsize=size),
        select_topk_traffic(rows, D_SAE, K, itemsize=size),
        decode_traffic(rows, K, D_SAE, D_IN, value_bytes=size, weight_bytes=size),
    )


def ours_step(rows: int) -> Kernels:
    """Forward and backward in bf16, weights' gradients in float32."""
    values = gradient_of_values_traffic(rows, K, D_SAE, D_IN)
    weight = gradient_of_weight_traffic(rows, K, D_SAE, D_IN)
    # Codes by feature: a radix sort of 4-byte keys with 8-byte places, four passes.
    sort = Traffic(4.0 * 12 * rows * K, 4.0 * 12 * rows * K)
    return (*ours(rows, 2), values, sort, weight, weight)


def ours_exact(rows: int, device: Device, *, with_cache: bool = False) -> float:
    """Milliseconds of exact float32 encoding by screening, and decoding."""
    screen, rescore = int8_screen_traffic(rows, D_IN, D_SAE, K)
    decode = decode_traffic(rows, K, D_SAE, D_IN, value_bytes=4, weight_bytes=4)
    # float64 multiplies at half of float32's rate or less.
    return (
        milliseconds((screen,), device.int8, device, with_cache=with_cache)
        + milliseconds((rescore,), device.float32 / 2, device, with_cache=with_cache)
        + milliseconds((decode,), device.float32, device, with_cache=with_cache)
    )


def sparsify_step(rows: int) -> Kernels:
    """sparsify's: forward; gathered gradients of values and of W_dec; the encoder's gradient, for
    which [rows, k, d_in] is written and read."""
    gathered = 1.0 * rows * K * D_IN * 2
    weights = D_SAE * D_IN * 4
    values = Traffic(gathered, l2_read=gathered)
    decoder = Traffic(gathered, weights, gathered)
    encoder = Traffic(gathered, gathered + weights, gathered)
    return (*sparsify_forward(rows, 2), values, decoder, encoder)


HEADINGS = (
    "torch bf16",
    "sparsify bf16",
    "flex bf16",
    "ours bf16",
    "torch fp32",
    "ours fp32 exact",
    "sparsify step",
    "ours step",
    "with L2: sparsify bf16",
    "ours bf16",
    "ours fp32 exact",
    "sparsify step",
    "ours step",
)


def cells(device: Device, rows: int) -> tuple[float, ...]:
    """Milliseconds, in the order of :data:`HEADINGS`."""

    def both(kernels: Kernels) -> tuple[float, float]:
        return (
            milliseconds(kernels, device.half, device),
            milliseconds(kernels, device.half, device, with_cache=True),
        )

    sparsify, step = both(sparsify_forward(rows, 2)), both(sparsify_step(rows))
    mine, mine_step = both(ours(rows, 2)), both(ours_step(rows))
    return (
        milliseconds(dense_forward(rows, 2), device.half, device),
        sparsify[0],
        milliseconds(flex_forward(rows, 2), device.half, device),
        mine[0],
        milliseconds(dense_forward(rows, 4), device.float32, device),
        ours_exact(rows, device),
        step[0],
        mine_step[0],
        sparsify[1],
        mine[1],
        ours_exact(rows, device, with_cache=True),
        step[1],
        mine_step[1],
    )


def lines() -> Iterator[str]:
    yield "# Floors on GPUs: computed, not measured"
    yield ""
    yield f"d_in {D_IN}, d_sae {D_SAE}, k {K}; milliseconds a call. Rates: 80 % of the vendors'"
    yield "dense peaks, 90 % of their bandwidth. From `benches/triton_kernels/roofline.py`."
    yield ""
    yield "| GPU | rows | " + " | ".join(HEADINGS) + " |"
    yield "|---|---|" + "---|" * len(HEADINGS)
    for device in DEVICES:
        for rows in ROWS:
            numbers = " | ".join(f"{cell:.2f}" for cell in cells(device, rows))
            yield f"| {device.name} | {rows} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    text = "\n".join(lines()) + "\n"
    if arguments.markdown:
        arguments.markdown.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
