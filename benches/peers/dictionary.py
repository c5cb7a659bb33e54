"""dictionary_learning: row top-k with dense codes."""

from __future__ import annotations

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor

from peers import Peer, folded_bias, with_tensors


class DictionaryLearning(Peer):
    """Its decoder weight is ``[d_in, d_sae]`` in memory, so ``W_dec`` is copied."""

    module: AutoEncoderTopK

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> None:
        with torch.device("meta"):
            module = AutoEncoderTopK(W_dec.shape[1], W_dec.shape[0], k)
        module.k = torch.tensor(k, dtype=torch.int)
        module.threshold = torch.tensor(-1.0)
        self.module = with_tensors(
            module,
            {
                "encoder.weight": W_enc.T.contiguous(),
                "encoder.bias": folded_bias(W_enc, b_enc, b_dec),
                "decoder.weight": W_dec.T.contiguous(),
                "b_dec": b_dec,
            },
        )

    def encode(self, x: Tensor) -> object:
        return self.module.encode(x)

    def forward(self, x: Tensor) -> Tensor:
        reconstruction: Tensor = self.module(x)
        return reconstruction

    def dense_codes(self, x: Tensor) -> Tensor:
        codes: Tensor = self.module.encode(x)
        return codes


build = DictionaryLearning
