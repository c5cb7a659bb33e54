"""Forward and backward of an SAE: sparse gradients beside dense ones and other libraries'."""

import torch
from torch import Tensor

from r1sae_fast import FastSAE


def loss_of(sae: FastSAE, x: Tensor, reconstruction: Tensor) -> Tensor:
    sae.zero_grad(set_to_none=True)
    loss = (reconstruction - x).pow(2).sum(-1).mean()
    loss.backward()
    return loss.detach()


def dense_forward(sae: FastSAE, x: Tensor) -> Tensor:
    """Plain torch with dense codes."""
    pre_activations = (x @ sae.W_enc + sae.b_enc).relu()
    values, indices = pre_activations.topk(sae.k)
    codes = torch.zeros_like(pre_activations).scatter(1, indices, values)
    return codes @ sae.W_dec + sae.b_dec


def test_forward_and_backward(versus, shape, generator, peers) -> None:
    torch.manual_seed(0)
    sae = FastSAE(shape.d_in, shape.d_sae, shape.k, "topk")
    x = torch.randn(shape.rows, shape.d_in, generator=generator)
    loss_of(sae, x, dense_forward(sae, x))
    expected = {name: p.grad.clone() for name, p in sae.named_parameters()}
    loss_of(sae, x, sae(x)[0])
    for name, parameter in sae.named_parameters():
        right = torch.isclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
        # A tie of the last bits may choose another feature in a row.
        assert float(right.float().mean()) > 0.999, name
    del expected
    weights = sae.W_enc.detach(), sae.W_dec.detach(), sae.b_enc.detach(), sae.b_dec.detach()
    built = {name: build(*weights, shape.k) for name, build in peers.items() if name != "goodfire"}
    versus(
        f"forward and backward float32, {shape}",
        ours=lambda: loss_of(sae, x, sae(x)[0]),
        torch=lambda: loss_of(sae, x, dense_forward(sae, x)),
        work=(shape.rows, "tokens"),
        **{name: lambda peer=peer: peer.step(x) for name, peer in built.items()},
    )
