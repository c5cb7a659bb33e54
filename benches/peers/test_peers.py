"""Each peer, built from our weights, computes what ours does: else its times say nothing."""

import pytest
import torch

from peers import KNOWN, installed
from r1sae_fast import FastSAE
from r1sae_fast.sae.config import Mode

ROWS, D_IN, D_SAE, K = 33, 64, 512, 8


@pytest.mark.parametrize("name", KNOWN)
def test_same_function(name: str) -> None:
    if name not in installed():
        pytest.skip(f"{name} is not installed (extra [bench])")
    torch.manual_seed(0)
    mode: Mode = "batch_topk" if name == "goodfire" else "topk"
    ours = FastSAE(D_IN, D_SAE, K, mode, tied=name == "goodfire")
    with torch.no_grad():
        ours.b_enc.normal_(std=0.1)
        ours.b_dec.normal_(std=0.1)
        x = torch.randn(ROWS, D_IN)
        peer = installed()[name](ours.W_enc, ours.W_dec, ours.b_enc, ours.b_dec, K)
        reconstruction, codes = ours(x)
        torch.testing.assert_close(peer.dense_codes(x), codes.to_dense(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(peer.forward(x), reconstruction, rtol=1e-4, atol=1e-5)
    assert peer.step(x) > 0
    for parameter in peer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
