"""EleutherAI's sparsify: row top-k, sparse decoder (embedding_bag on a CPU)."""

from __future__ import annotations

import contextlib
import io
import os

import torch
from torch import Tensor

from peers import Peer, folded_bias, with_tensors

# Its Triton decoder is taken wherever triton is installed, and fails on a CPU.
if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
with contextlib.redirect_stdout(io.StringIO()):  # it prints when imported
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig


class Sparsify(Peer):
    """Takes the weights as they are; :meth:`forward` is the library's, its FVU and all."""

    module: SparseCoder

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> None:
        config = SparseCoderConfig(num_latents=W_dec.shape[0], k=k, normalize_decoder=False)
        module = SparseCoder(W_dec.shape[1], config, device="meta", dtype=W_dec.dtype)
        self.module = with_tensors(
            module,
            {
                "encoder.weight": W_enc.T.contiguous(),
                "encoder.bias": folded_bias(W_enc, b_enc, b_dec),
                "W_dec": W_dec,
                "b_dec": b_dec,
            },
        )

    def encode(self, x: Tensor) -> object:
        return self.module.encode(x)

    def forward(self, x: Tensor) -> Tensor:
        reconstruction: Tensor = self.module(x).sae_out
        return reconstruction

    def dense_codes(self, x: Tensor) -> Tensor:
        values, indices, _ = self.module.encode(x)
        return x.new_zeros(len(x), self.module.num_latents).scatter(-1, indices, values)

    def loss(self, x: Tensor) -> Tensor:
        fvu: Tensor = self.module(x).fvu
        return fvu

    def after_step(self) -> None:
        self.module.set_decoder_norm_to_unit_norm()


build = Sparsify
