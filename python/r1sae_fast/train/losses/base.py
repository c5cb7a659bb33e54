"""What a loss is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor
from torch.nn import functional as F

from r1sae_fast.codes import SparseCodes

Parameters = dict[str, Tensor]
"""``encoder`` and (unless tied) ``decoder [d_sae, d_in]``, ``b_enc``, ``b_dec``, and others."""


class Finder(Protocol):
    """Finds codes among the pre-activations of ``x [rows, d_in]``, ties by the lower feature."""

    def topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """As :func:`r1sae_fast.ops.topk`."""

    def batch_topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """As :func:`r1sae_fast.ops.batch_topk`."""

    def threshold(self, x: Tensor, theta: Tensor | float, *, check_finite: bool) -> SparseCodes:
        """As :func:`r1sae_fast.ops.threshold`."""


Number = TypeVar("Number", float, Tensor)


class Total(Protocol):
    """The sum of a number over all features, of that over own ones."""

    def __call__(self, value: Number, /) -> Number:
        """A number, or a tensor of one."""


def _all_are_own(value: Number, /) -> Number:
    return value


@dataclass(frozen=True)
class Sae:
    """An SAE in training, as losses see it: all rows of a batch, and the process's own features
    (:mod:`r1sae_fast.train.parallel`), which are all where there is one process."""

    parameters: Parameters
    find: Finder
    decode: Callable[[SparseCodes], Tensor]
    """Codes times the decoder, ``[rows, d_in]``, without ``b_dec``: of own codes what those of all
    features make."""
    total: Total = _all_are_own
    first: int = 0
    """Number of the first own feature among all."""


class Part(NamedTuple):
    """Codes whose reconstruction has one gradient."""

    codes: SparseCodes
    gradient: Tensor
    """``[rows, d_in]``; times ``2 / numel`` it is the loss's gradient in what the codes make."""
    extra: Tensor | None = None
    """The loss's gradient in the codes' values besides: ``[nnz]``, or ``[]`` for all of them."""
    learns: bool = True
    """False: the gradients of the values are asked for, but encoder and decoder have no part."""


class Forward(NamedTuple):
    """A loss of rows, and what its gradients are sums of."""

    fired: SparseCodes
    loss: Tensor
    """What is minimised (without the auxiliary loss), a number per activation number."""
    error: Tensor
    """``[rows, d_in]``: the whole reconstruction minus x (a transcoder's: minus its target)."""
    squared: Tensor
    """Its sum of squares."""
    parts: list[Part]
    """Their codes are disjoint."""
    of_b_dec: Tensor
    """``[rows, d_in]``; ``2 / numel`` times its sum over rows is the gradient of b_dec."""
    found: int
    """Own pre-activations that were looked at: the codes, and any besides."""


class Definition(NamedTuple):
    """The same by the dense definition, for autograd."""

    loss: Tensor
    reconstruction: Tensor
    pre_activations: Tensor


def pre_activations(parameters: Parameters, x: Tensor) -> Tensor:
    """``[rows, d_sae]``."""
    return x @ parameters["encoder"].T + parameters["b_enc"]


def decoder(parameters: Parameters) -> Tensor:
    """``[d_sae, d_in]``: the encoder when tied."""
    return parameters.get("decoder", parameters["encoder"])


def only(codes: SparseCodes, mask: Tensor) -> SparseCodes:
    """The codes where ``mask [nnz]`` is true, in the rows they were in."""
    before = F.pad(mask.cumsum(0), (1, 0))
    return SparseCodes(
        codes.values[mask], codes.indices[mask], before[codes.row_offsets], codes.d_sae
    )
