"""The kernels on this machine's GPU beside torch and sparsify, if installed: make bench-gpu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

D_IN, D_SAE, K = 7168, 28672, 64

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU here: nothing to time"
)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def weights(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """W_dec [d_sae, d_in], whose transpose is W_enc, and b_enc."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(D_SAE, D_IN, device="cuda", generator=generator) / D_IN**0.5
    return weight.to(request.param), torch.zeros(D_SAE, device="cuda", dtype=request.param)


def timed(benchmark: Any, call: Callable[[], object]) -> None:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    for _ in range(3):
        run()
    benchmark(run)


def forward(name: str, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> Any:
    """One contender's encode and decode."""
    if name == "torch":

        def dense() -> torch.Tensor:
            pre = (x @ weight.T + bias).relu()
            values, indices = pre.topk(K, dim=-1)
            return torch.zeros_like(pre).scatter_(1, indices, values) @ weight

        return dense
    if name == "sparsify":
        sparsify = pytest.importorskip("sparsify.sparse_coder")

        def peer() -> torch.Tensor:
            found = sparsify.fused_encoder(x, weight, bias, K, "topk")
            return sparsify.decoder_impl(found[1], found[0], weight.mT)

        return peer
    from r1sae_fast.triton_kernels.decode import decode
    from r1sae_fast.triton_kernels.encode_topk import encode_topk
    from r1sae_fast.triton_kernels.int8_screen import int8_screen_topk, screened_weights

    if x.dtype == torch.float32:
        screened = screened_weights(weight, bias)
        return lambda: decode(*int8_screen_topk(x, screened, K)[0], weight)

    def kernels() -> torch.Tensor:
        found = encode_topk(x, weight.T, bias, K)
        offsets = torch.arange(0, x.shape[0] * K + 1, K, device="cuda")
        return decode(found.values.view(-1), found.indices.view(-1), offsets, weight)

    return kernels


@pytest.mark.parametrize("rows", [512, 4096, 32768])
@pytest.mark.parametrize("name", ["ours", "torch", "sparsify"])
def test_forward(
    benchmark: Any, weights: tuple[torch.Tensor, torch.Tensor], rows: int, name: str
) -> None:
    weight, bias = weights
    benchmark.group = f"forward, {rows} rows, {weight.dtype}"
    x = torch.randn(rows, D_IN, device="cuda", dtype=weight.dtype)
    timed(benchmark, forward(name, weight, bias, x))
