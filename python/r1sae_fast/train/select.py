"""Which pre-activations become codes, by the package's own operations on dense products."""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes
from r1sae_fast.train.losses.base import Finder


class DenseFinder:
    """Finds what :class:`r1sae_fast.ops.Screen` finds, on any device, by all pre-activations.

    Args:
        encoder: ``[d_sae, d_in]``; kept, not copied.
        b_enc: ``[d_sae]``; likewise.
    """

    def __init__(self, encoder: Tensor, b_enc: Tensor) -> None:
        self.encoder, self.b_enc = encoder, b_enc

    def topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """The k strongest of each row."""
        return ops.topk(self._pre_activations(x), k, check_finite=check_finite)

    def batch_topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """The ``k * rows`` strongest of all."""
        return ops.batch_topk(self._pre_activations(x), k, check_finite=check_finite)

    def threshold(self, x: Tensor, theta: Tensor | float, *, check_finite: bool) -> SparseCodes:
        """Those above ``theta``, a number or ``[d_sae]``, and above 0."""
        return ops.threshold(self._pre_activations(x), theta, check_finite=check_finite)

    def _pre_activations(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b_enc, x, self.encoder.T)


class RowByRow:
    """Finds each row's own k codes where the k of all rows together are asked for."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder

    def topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """The k strongest of each row."""
        return self._finder.topk(x, k, check_finite=check_finite)

    batch_topk = topk

    def threshold(self, x: Tensor, theta: Tensor | float, *, check_finite: bool) -> SparseCodes:
        """As found."""
        return self._finder.threshold(x, theta, check_finite=check_finite)
