"""An SAE's encode and its whole forward, beside plain torch and beside other libraries' SAEs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE


def plain_encode(sae: FastSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense pre-activations, then torch.topk of each row: what anyone would write."""
    values, indices = (x @ sae.W_enc + sae.b_enc).relu().topk(sae.k)
    return values, indices


def plain_forward(sae: FastSAE, x: Tensor) -> Tensor:
    values, indices = plain_encode(sae, x)
    bags = torch.nn.functional.embedding_bag(
        indices, sae.W_dec, per_sample_weights=values, mode="sum"
    )
    return bags + sae.b_dec


def plain_batch_encode(sae: FastSAE, x: Tensor) -> Tensor:
    """As released: dense codes, one top-k over the whole batch."""
    pre_activations = (x @ sae.W_enc + sae.b_enc).relu().reshape(-1)
    found = pre_activations.topk(sae.k * len(x))
    kept = torch.zeros_like(pre_activations).scatter(0, found.indices, found.values)
    return kept.reshape(len(x), sae.d_sae)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def sae(request, shape) -> FastSAE:
    torch.manual_seed(0)
    sae = FastSAE(
        shape.d_in, shape.d_sae, shape.k, "topk", tied=True, dtype=getattr(torch, request.param)
    )
    return sae.requires_grad_(False)


@pytest.fixture
def x(sae, shape, generator) -> Tensor:
    return torch.randn(shape.rows, shape.d_in, generator=generator).to(sae.dtype)


def same_codes(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for values that lie at the edge of the choice, which rounding may move."""
    return float(((ours != 0) != (theirs != 0)).double().mean()) < 1e-3


def others(peers: dict[str, Callable], sae: FastSAE, names: set[str]) -> dict[str, object]:
    weights = sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec
    return {name: build(*weights, sae.k) for name, build in peers.items() if name in names}


ROW_PEERS = {"sparsify", "saelens", "dictionary_learning"}


@torch.no_grad()
def test_encode(versus, shape, sae, x, peers) -> None:
    built = others(peers, sae, ROW_PEERS)
    ours = sae.encode_sparse(x).to_dense()
    values, indices = plain_encode(sae, x)
    assert same_codes(ours, torch.zeros_like(ours).scatter(1, indices, values))
    assert all(same_codes(ours, peer.dense_codes(x)) for peer in built.values())
    versus(
        f"encode {sae.dtype}, {shape}",
        ours=lambda: sae.encode_sparse(x),
        torch=lambda: plain_encode(sae, x),
        work=(shape.rows, "tokens"),
        **{name: lambda peer=peer: peer.encode(x) for name, peer in built.items()},
    )


@torch.no_grad()
def test_forward(versus, shape, sae, x, peers) -> None:
    built = others(peers, sae, ROW_PEERS)
    versus(
        f"encode and decode {sae.dtype}, {shape}",
        ours=lambda: sae(x),
        torch=lambda: plain_forward(sae, x),
        work=(shape.rows, "tokens"),
        **{name: lambda peer=peer: peer.forward(x) for name, peer in built.items()},
    )


@torch.no_grad()
def test_batch_topk_forward(versus, shape, sae, x, peers) -> None:
    built = others(peers, sae, {"goodfire"})
    sae.mode = "batch_topk"
    try:
        assert same_codes(sae.encode_sparse(x).to_dense(), plain_batch_encode(sae, x))
        versus(
            f"batch top-k encode and decode {sae.dtype}, {shape}",
            ours=lambda: sae(x),
            torch=lambda: plain_batch_encode(sae, x) @ sae.W_dec + sae.b_dec,
            work=(shape.rows, "tokens"),
            **{name: lambda peer=peer: peer.forward(x) for name, peer in built.items()},
        )
    finally:
        sae.mode = "topk"
