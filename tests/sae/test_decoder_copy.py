"""Decoding by a copy of the weights in 16 bits."""

import copy

import pytest
import torch

from r1sae_fast import FastSAE, ops

DTYPES = [torch.float16, torch.bfloat16]


def made() -> tuple[FastSAE, torch.Tensor]:
    torch.manual_seed(3)
    sae = FastSAE(48, 200, 5, "topk")
    with torch.no_grad():
        sae.b_dec.normal_()
    return sae, torch.randn(7, 48)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_it_follows_the_weights(dtype: torch.dtype) -> None:
    sae, x = made()
    codes = sae.encode_sparse(x)
    exact = sae.decode(codes)
    sae.decoder_copy = dtype
    for _ in range(2):
        found = sae.decode(codes)
        assert found.dtype == torch.float32
        assert torch.equal(found, ops.decode(codes, sae.W_dec.to(dtype).float(), sae.b_dec))
        sae.W_dec.mul_(1.1)
    # Each weight is off by half a unit in its last place at most.
    unit = torch.finfo(dtype).eps / 2
    off = ops.decode(codes, sae.W_dec.abs()) * unit * 1.01 + 1e-6
    sae.W_dec.div_(1.1**2)
    assert bool(((sae.decode(codes) - exact).abs() <= off).all())
    sae.decoder_copy = None
    torch.testing.assert_close(sae.decode(codes), exact)
    other = copy.deepcopy(sae)
    other.decoder_copy = dtype
    assert torch.equal(
        other.decode(codes), ops.decode(codes, sae.W_dec.to(dtype).float(), sae.b_dec)
    )


def test_values_learn_through_the_copy_and_weights_do_not() -> None:
    sae, x = made()
    sae.decoder_copy = torch.float16
    x.requires_grad_()
    # W_dec learns: its own numbers count.
    sae(x)[0].square().sum().backward()
    of_weight = sae.W_dec.grad
    sae.decoder_copy, sae.W_dec.grad = None, None
    sae(x.detach())[0].square().sum().backward()
    assert torch.equal(of_weight, sae.W_dec.grad)
    # Frozen, the gradient of x goes through the copy.
    sae.requires_grad_(False)
    sae.decoder_copy, x.grad = torch.float16, None
    sae(x)[0].square().sum().backward()
    plain, y = FastSAE(48, 200, 5, "topk"), x.detach().clone().requires_grad_()
    plain.load_state_dict(sae.state_dict())
    plain.requires_grad_(False)
    plain.W_dec.copy_(sae.W_dec.half().float())
    plain(y)[0].square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@torch.no_grad()
def test_what_it_can_not_hold_is_named() -> None:
    sae, x = made()
    codes = sae.encode_sparse(x)
    sae.W_dec[150, 3] = 1e5
    sae.decoder_copy = torch.float16
    with pytest.raises(ValueError, match="feature 150"):
        sae.decode(codes)
    sae.decoder_copy = torch.bfloat16
    assert sae.decode(codes).isfinite().all()
    sae.decoder_copy = torch.float64
    with pytest.raises(ValueError, match="float64"):
        sae.decode(codes)


@torch.no_grad()
def test_new_weights_at_the_place_of_old_ones_are_copied_again() -> None:
    """Same address, shape and version: what only their identity tells apart."""
    kept, memory = ops.DecoderCopy(torch.bfloat16), torch.zeros(4 * 3)
    for value in (1.0, 2.0):
        weights = torch.frombuffer(memory.numpy(), dtype=torch.float32).view(4, 3)
        memory.fill_(value)
        assert weights._version == 0
        assert torch.equal(kept.of(weights), weights.bfloat16())
        del weights
    parameter = torch.nn.Parameter(torch.ones(4, 3), requires_grad=False)
    for value in (3.0, 4.0):
        parameter.data = torch.frombuffer(memory.numpy(), dtype=torch.float32).view(4, 3)
        memory.fill_(value)
        assert torch.equal(kept.of(parameter), parameter.bfloat16())
    first = kept.of(parameter)
    assert kept.of(parameter) is first
