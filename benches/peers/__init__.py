"""Other libraries' SAEs, each built from the same weights as ours, behind one small face.

    peer = installed()["sparsify"](W_enc, W_dec, b_enc, b_dec, k)
    peer.forward(x)             # the reconstruction
    peer.encode(x)              # codes, in the library's own form
    peer.dense_codes(x)         # the same, [rows, d_sae], to check that it computes what ours does
    peer.step(x)                # forward and backward; gradients land on peer.parameters()

Ours adds ``b_enc`` and subtracts no ``b_dec``; where a library always subtracts, its encoder bias
is ``b_enc + b_dec @ W_enc``, which makes it the same function. Weights lie in memory as the library
itself has them; parameters are shared with the tensors given where that allows it.
"""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TypeVar

import torch
from torch import Tensor, nn

# Name of a contender: the module that must be there, the adapter.
KNOWN = {
    "goodfire": ("torch", "peers.goodfire"),
    "sparsify": ("sparsify", "peers.eai_sparsify"),
    "saelens": ("sae_lens", "peers.saelens"),
    "dictionary_learning": ("dictionary_learning", "peers.dictionary"),
}

Module = TypeVar("Module", bound=nn.Module)


class Peer(ABC):
    """One library's SAE, of ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, the biases and k."""

    module: nn.Module

    @abstractmethod
    def encode(self, x: Tensor) -> object:
        """Codes of ``x [rows, d_in]``, in the library's own form."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction ``[rows, d_in]``, as the library's users get it."""

    @abstractmethod
    def dense_codes(self, x: Tensor) -> Tensor:
        """Codes ``[rows, d_sae]``."""

    def loss(self, x: Tensor) -> Tensor:
        """What the library trains on, without an auxiliary loss."""
        return (self.forward(x) - x).pow(2).sum(-1).mean()

    def step(self, x: Tensor) -> Tensor:
        """Forward and backward; returns the loss."""
        for parameter in self.parameters():
            parameter.grad = None
        loss = self.loss(x)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return loss.detach()

    def after_step(self) -> None:  # noqa: B027  # most have nothing to do
        """What the library's trainer does to the weights after each step of the optimizer."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What :meth:`step` gives gradients to."""
        return self.module.parameters()


def installed(names: Iterable[str] = KNOWN) -> dict[str, Callable[..., Peer]]:
    """The adapters of the libraries that are there, by contender's name; none is imported yet."""
    return {
        name: _builder(KNOWN[name][1])
        for name in names
        if importlib.util.find_spec(KNOWN[name][0]) is not None
    }


def _builder(adapter: str) -> Callable[..., Peer]:
    def build(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> Peer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, when imported and built
            peer: Peer = import_module(adapter).build(W_enc, W_dec, b_enc, b_dec, k)
        return peer

    return build


def with_tensors(module: Module, tensors: Mapping[str, Tensor]) -> Module:
    """Puts tensors in place of a module's parameters, by dotted name, without a copy.

    Raises:
        ValueError: a parameter is left on the meta device, or the names don't fit.
    """
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if last not in dict(owner.named_parameters(recurse=False)):
            raise ValueError(f"{type(module).__name__} has no parameter {name}")
        setattr(owner, last, nn.Parameter(tensor))
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if left:
        raise ValueError(f"{type(module).__name__} has no values for {left}")
    return module


def folded_bias(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The encoder bias of a library that subtracts ``b_dec`` from x."""
    with torch.no_grad():
        return b_enc + b_dec @ W_enc
