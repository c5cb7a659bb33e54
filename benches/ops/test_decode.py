"""Decoding and its gradients: the dense product, torch's embedding_bag, and the path users get."""

import torch
from torch.nn.functional import embedding_bag

from r1sae_fast import SparseCodes
from r1sae_fast.ops import decode, decode_reference, topk


def contest_data(shape, generator) -> tuple[SparseCodes, torch.Tensor]:
    W_dec = torch.randn(shape.d_sae, shape.d_in, generator=generator) / shape.d_in**0.5
    return topk(torch.randn(shape.rows, shape.d_sae, generator=generator), shape.k), W_dec


def test_decode(versus, shape, generator) -> None:
    codes, W_dec = contest_data(shape, generator)
    arguments = (codes.values, codes.indices, codes.row_offsets, W_dec, None)
    expected = decode_reference(*arguments)
    some = codes[:8].to_dense().double() @ W_dec.double()
    error = (expected[:8] - some).abs().max()  # of torch itself, in the same dtype
    assert (decode(codes, W_dec)[:8] - some).abs().max() <= 4 * error
    index = codes.indices.long().reshape(shape.rows, shape.k)
    weights = codes.values.reshape(shape.rows, shape.k)
    versus(
        f"decode float32, {shape}",
        ours=lambda: decode(codes, W_dec),
        torch=lambda: decode_reference(*arguments),
        embedding_bag=lambda: embedding_bag(index, W_dec, per_sample_weights=weights, mode="sum"),
        work=(codes.nnz * shape.d_in * 4, "bytes"),
    )
