"""The gradients of a step by the package's sparse operations: Triton's kernels on a GPU.

As :mod:`r1sae_fast.train.gradients`, which is plain torch and their truth. Dead features' codes
carry the numbers they have among all features, so that decoder and gradients need no copy of their
rows; only the encoder's are gathered, for the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops.decode import _gradient_of_values
from r1sae_fast.train.gradients import Auxiliary, Gradients, Weights
from r1sae_fast.train.losses.base import Part
from r1sae_fast.train.select import DenseFinder

__all__ = ["gradients"]

_Three = tuple[Tensor, Tensor, Tensor]


def gradients(
    parts: list[Part],
    x: Tensor,
    weights: Weights,
    error: Tensor,
    scale: float,
    auxiliary: Auxiliary | None,
) -> tuple[Gradients[Tensor], Tensor]:
    """Gradients of the weights, and the auxiliary loss; arguments as for
    :func:`r1sae_fast.train.gradients.gradients`."""
    total: _Three | None = None
    of_values = []
    for part in parts:
        own, found = _backward(part, x, weights.decoder, scale, None)
        of_values.append(own)
        if found is None:
            continue
        if total is None:
            total = found
        else:
            for mine, other in zip(total, found, strict=True):
                mine += other
    assert total is not None
    encoder, decoder, b_enc = total
    loss = error.new_zeros(())
    if auxiliary is not None:
        dead, k, coefficient, ranks = auxiliary
        finder = _KernelFinder(weights.encoder[dead], weights.b_enc[dead])
        of_dead = ranks.finder(finder, len(dead)).topk(x, k, check_finite=False)
        features = dead[of_dead.indices.long()].to(torch.int32)
        d_sae = weights.decoder.shape[0]
        among_all = SparseCodes(of_dead.values, features, of_dead.row_offsets, d_sae)
        decoded = ranks.decoded(lambda codes: ops.decode(codes, weights.decoder), among_all)
        missed = decoded.add_(error)
        size = error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)
        loss = missed.square().sum() / size
        _, more = _backward(Part(among_all, missed), x, weights.decoder, 2.0 / size, dead)
        assert more is not None
        for mine, other in zip((encoder, decoder, b_enc), more, strict=True):
            # Each dead feature once: nothing is added up here.
            mine.index_add_(0, dead, other, alpha=coefficient)
    if weights.encoder is weights.decoder:
        encoder.add_(decoder)
        decoder = encoder
    return Gradients(encoder, decoder, b_enc, of_values), loss


class _KernelFinder(DenseFinder):
    """Finds top-k without writing pre-activations out."""

    def topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """As :func:`r1sae_fast.ops.encode_topk`."""
        return ops.encode_topk(x, self.encoder, self.b_enc, k, check_finite=check_finite)


def _backward(
    part: Part, x: Tensor, decoder: Tensor, scale: float | Tensor, features: Tensor | None
) -> tuple[Tensor, _Three | None]:
    """The gradient of the part's values, and those of encoder, decoder and b_enc if it learns."""
    codes, gradient = part.codes, part.gradient * scale
    where = (codes.indices, codes.row_offsets)
    of_values: Tensor = _gradient_of_values(gradient, *where, decoder)
    if part.extra is not None:
        of_values = of_values + part.extra
    if not part.learns:
        return of_values, None
    return of_values, ops.code_gradients(
        x, of_values, gradient, codes.values, *where, decoder.shape[0], features
    )
