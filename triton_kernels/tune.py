"""Measures launch settings on this machine's GPU and writes the fastest to a file.

    python -m r1sae_fast.triton_kernels.tune settings.json

Opt-in: nothing else tunes. ``configs.load(path)`` puts the file in force.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from r1sae_fast.triton_kernels import configs
from r1sae_fast.triton_kernels.configs import Config
from r1sae_fast.triton_kernels.targets import TARGETS, target_of

__all__ = ["candidates", "fastest", "main"]


def candidates(start: Config) -> list[Config]:
    """``start`` and its neighbours: one block size halved or doubled, other warps, other stages."""
    sizes = [(n, other) for n, size in start.blocks.items() for other in (size // 2, size * 2)]
    warps = (start.num_warps // 2, start.num_warps * 2)
    stages = (start.num_stages - 1, start.num_stages + 1)
    return [
        start,
        *(replace(start, blocks={**start.blocks, n: other}) for n, other in sizes if other),
        *(replace(start, num_warps=other) for other in warps if 1 <= other <= 16),
        *(replace(start, num_stages=other) for other in stages if other),
    ]


def fastest(
    tried: Iterable[Config], time: Callable[[Config], float]
) -> tuple[Config, float] | None:
    """The candidate with the least time, and the time; what fails (too much shared memory, a shape
    the compiler refuses) is passed over. None if all do."""
    best: tuple[Config, float] | None = None
    for config in tried:
        try:
            taken = time(config)
        except Exception:  # noqa: BLE001  # the compiler's and the driver's errors share no class
            continue
        if best is None or taken < best[1]:
            best = (replace(config, reason=f"measured: {taken:.4f} ms"), taken)
    return best


def _calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """A call of each tunable family at R1's shape."""
    from r1sae_fast.triton_kernels.decode import decode
    from r1sae_fast.triton_kernels.encode_topk import encode_topk
    from r1sae_fast.triton_kernels.sparse_grad import (
        feature_major,
        gradient_of_values,
        gradient_of_weight,
    )

    rows, d_in, d_sae, k = 4096, 7168, 28672, 64
    bf16 = torch.bfloat16
    x = torch.randn(rows, d_in, device=device, dtype=bf16)
    weight = torch.randn(d_sae, d_in, device=device, dtype=bf16)
    bias = torch.zeros(d_sae, device=device, dtype=bf16)
    values, indices, offsets = encode_topk(x, weight.T, bias, k).compact()
    by_feature = feature_major(indices, offsets, d_sae)
    return {
        "encode_gemm, half": lambda: encode_topk(x, weight.T, bias, k),
        "decode": lambda: decode(values, indices, offsets, weight),
        "gradient_of_values": lambda: gradient_of_values(x, indices, offsets, weight),
        "gradient_of_weight": lambda: gradient_of_weight(x, values, by_feature),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="where the settings go, as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU; torch sees none here (torch.cuda.is_available() is False)")
    from triton.testing import do_bench

    device = torch.device("cuda")
    target = target_of(device)
    assert target in TARGETS
    measured: dict[str, dict[str, Config]] = {}
    for family, call in _calls(device).items():

        def time(config: Config, family: str = family, call: Callable[[], object] = call) -> float:
            with configs.using(family, target, config):
                return float(do_bench(call, return_mode="median"))

        best = fastest(candidates(configs.config(family, device)), time)
        if best is not None:
            measured[family] = {target: best[0]}
            sys.stdout.write(f"{family}: {best[0].options} {best[1]:.4f} ms\n")
    configs.save(arguments.file, measured)
    sys.stdout.write(f"written: {arguments.file}\n")


if __name__ == "__main__":
    main()
