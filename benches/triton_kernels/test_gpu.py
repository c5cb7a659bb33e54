"""The kernels on this machine's GPU beside torch, sparsify and flex-sae: make bench-gpu.

sparsify where it is installed (``eai-sparsify``); flex-sae where ``kernels``, Hugging Face's loader
of published kernels, is: its first use downloads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from r1sae_fast import FastSAE, SaeConfig

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
    sae = ours(weight, bias)
    with torch.no_grad():
        sae(x)  # rounds the weights where they are screened
    return lambda: torch.no_grad()(sae)(x)


def ours(weight: torch.Tensor, bias: torch.Tensor) -> FastSAE:
    """What a user has; float32 is screened, bf16 is not."""
    config = SaeConfig(D_IN, D_SAE, K, "topk", tied=True)
    b_dec = torch.zeros(D_IN, device="cuda", dtype=weight.dtype)
    sae = FastSAE.from_tensors(config, weight, bias, b_dec)
    sae.check_finite = False
    return sae


def flex_loss() -> Any:
    """flex-sae's published entry point: squared error of decoding, by Triton."""
    kernels = pytest.importorskip("kernels", reason="flex-sae needs the package kernels")
    return kernels.get_kernel("t-tech/flex-sae").triton_topk_sae_loss


def codes_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    values, indices = (x @ weight.T + bias).relu().topk(K, dim=-1)
    return values, indices


@pytest.mark.parametrize("rows", [512, 4096, 32768])
@pytest.mark.parametrize("name", ["ours", "flex"])
def test_decode_and_error(
    benchmark: Any, weights: tuple[torch.Tensor, torch.Tensor], rows: int, name: str
) -> None:
    """What flex-sae has: from codes to the squared error."""
    weight, bias = weights
    benchmark.group = f"decode and error, {rows} rows, {weight.dtype}"
    x = torch.randn(rows, D_IN, device="cuda", dtype=weight.dtype)
    values, indices = codes_of(x, weight, bias)
    b_dec = torch.zeros(D_IN, device="cuda", dtype=weight.dtype)
    if name == "flex":
        loss = flex_loss()
        timed(benchmark, lambda: loss(indices, weight, values, b_dec, x))
        return
    from r1sae_fast.triton_kernels.decode import decode_error

    offsets = torch.arange(0, rows * K + 1, K, device="cuda")
    given = (values.reshape(-1), indices.reshape(-1).int(), offsets, weight, x, b_dec)
    timed(benchmark, lambda: decode_error(*given, write_output=False, write_error=False)[2].sum())


@pytest.mark.parametrize("rows", [512, 4096])
@pytest.mark.parametrize("name", ["ours", "torch", "sparsify", "flex"])
def test_step(
    benchmark: Any, weights: tuple[torch.Tensor, torch.Tensor], rows: int, name: str
) -> None:
    """Forward, squared error and backward."""
    weight, bias = weights
    benchmark.group = f"forward and backward, {rows} rows, {weight.dtype}"
    x = torch.randn(rows, D_IN, device="cuda", dtype=weight.dtype)
    decoder = weight.clone().requires_grad_()
    encoder, b_enc = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    b_dec = torch.zeros(D_IN, device="cuda", dtype=weight.dtype, requires_grad=True)
    if name == "ours":
        config = SaeConfig(D_IN, D_SAE, K, "topk")
        sae = FastSAE.from_tensors(config, weight.clone(), bias, b_dec.detach(), weight.clone().T)
        sae.check_finite = False
        error: Callable[[], torch.Tensor] = lambda: (sae(x)[0] - x).square().mean()  # noqa: E731
        parameters = list(sae.parameters())
    else:
        parameters = [encoder, b_enc, decoder, b_dec]
        if name == "sparsify":
            sparsify = pytest.importorskip("sparsify.sparse_coder")

            def error() -> torch.Tensor:
                found = sparsify.fused_encoder(x, encoder, b_enc, K, "topk")
                decoded = sparsify.decoder_impl(found[1], found[0], decoder.mT)
                return (decoded + b_dec - x).square().mean()
        elif name == "flex":
            loss = flex_loss()

            def error() -> torch.Tensor:
                values, indices = codes_of(x, encoder, b_enc)
                found: torch.Tensor = loss(indices, decoder, values, b_dec, x)
                return found
        else:

            def error() -> torch.Tensor:
                pre = (x @ encoder.T + b_enc).relu()
                values, indices = pre.topk(K, dim=-1)
                dense = torch.zeros_like(pre).scatter(1, indices, values)
                return (dense @ decoder + b_dec - x).square().mean()

    def step() -> None:
        error().backward()
        for parameter in parameters:
            parameter.grad = None

    timed(benchmark, step)


@pytest.mark.parametrize("rows", [512, 4096, 32768])
@pytest.mark.parametrize("name", ["ours", "torch", "sparsify"])
def test_forward(
    benchmark: Any, weights: tuple[torch.Tensor, torch.Tensor], rows: int, name: str
) -> None:
    weight, bias = weights
    benchmark.group = f"forward, {rows} rows, {weight.dtype}"
    x = torch.randn(rows, D_IN, device="cuda", dtype=weight.dtype)
    timed(benchmark, forward(name, weight, bias, x))
