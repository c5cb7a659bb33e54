"""Decoding: the dense product, and the path that users get."""

import pytest
import torch

from r1sae_fast.ops import decode, decode_reference, topk

ROWS, D_SAE, D_IN, K = 64, 28_672, 7_168, 64


@pytest.mark.parametrize("path", ["reference", "ours"])
def test_decode(benchmark, generator, path: str) -> None:
    W_dec = torch.randn(D_SAE, D_IN, generator=generator) / D_IN**0.5
    codes = topk(torch.randn(ROWS, D_SAE, generator=generator), K)
    arguments = (codes.values, codes.indices, codes.row_offsets, W_dec, None)
    expected = decode_reference(*arguments)
    exact = codes.to_dense().double() @ W_dec.double()
    error = (expected - exact).abs().max()  # of torch itself, in the same dtype
    assert (decode(codes, W_dec) - exact).abs().max() <= 4 * error
    benchmark.group = f"decode, {ROWS} x {D_SAE} x {D_IN}, k={K}"
    if path == "ours":
        benchmark.pedantic(decode, args=(codes, W_dec), rounds=5, warmup_rounds=1)
    else:
        benchmark.pedantic(decode_reference, args=arguments, rounds=5, warmup_rounds=1)
