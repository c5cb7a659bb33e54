"""SAELens: row top-k with dense codes; its training variant for steps."""

from __future__ import annotations

from typing import Any

from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from peers import Peer, with_tensors


class SAELens(Peer):
    """Decoder norms are not folded in, so that it computes what the others do."""

    module: Any

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> None:
        settings: dict[str, Any] = {
            "d_in": W_dec.shape[1],
            "d_sae": W_dec.shape[0],
            "k": k,
            "dtype": str(W_dec.dtype).removeprefix("torch."),
            "device": "meta",
            "apply_b_dec_to_input": False,
            "rescale_acts_by_decoder_norm": False,
        }
        tensors = {"W_enc": W_enc.contiguous(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
        self.module = with_tensors(TopKSAE(TopKSAEConfig(**settings)), tensors)
        self.training = with_tensors(TopKTrainingSAE(TopKTrainingSAEConfig(**settings)), tensors)
        for module in (self.module, self.training):
            module.device = W_dec.device

    def encode(self, x: Tensor) -> object:
        return self.module.encode(x)

    def forward(self, x: Tensor) -> Tensor:
        reconstruction: Tensor = self.module(x)
        return reconstruction

    def dense_codes(self, x: Tensor) -> Tensor:
        codes: Tensor = self.module.encode(x)
        return codes

    def loss(self, x: Tensor) -> Tensor:
        step = TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        loss: Tensor = self.training.training_forward_pass(step).loss
        return loss

    def parameters(self) -> Any:
        return self.training.parameters()


build = SAELens
