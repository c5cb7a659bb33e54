"""Codes straight from x: every pre-activation bounded cheaply, the few that matter computed exactly.

The dense path multiplies in full precision and then throws all but k of d_sae products away. A
:class:`Screen` bounds them all in int8 first, with a margin that is certified (see
``rust/core/src/screen``), discards what the bound excludes, and computes the rest exactly.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops.batch_topk import batch_topk
from r1sae_fast.ops.threshold import threshold
from r1sae_fast.ops.topk import topk

__all__ = ["SCREEN_KINDS", "Screen", "ScreenKind"]

ScreenKind = Literal["auto", "int8", "none"]
SCREEN_KINDS: tuple[ScreenKind, ...] = get_args(ScreenKind)


class Screen:
    """Encodes with one set of weights.

    Args:
        W_features: ``[d_sae, d_in]`` contiguous: the transpose of W_enc. Kept, not copied.
        b_enc: ``[d_sae]``. Kept, not copied.
        kind: ``"auto"`` chooses by dtype, size and CPU; ``"none"`` is the dense path.

    Raises:
        ValueError: shapes that don't fit, or a kind that these weights can't have.
    """

    def __init__(self, W_features: Tensor, b_enc: Tensor, kind: ScreenKind = "auto") -> None:
        if kind not in SCREEN_KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(SCREEN_KINDS)}")
        if W_features.dim() != 2 or tuple(b_enc.shape) != (W_features.shape[0],):
            raise ValueError(
                f"W_features has shape {tuple(W_features.shape)} and b_enc {tuple(b_enc.shape)}; "
                "expected [d_sae, d_in] and [d_sae]"
            )
        self._W, self._b = W_features.detach(), b_enc.detach()
        self.requested: ScreenKind = kind

    def refresh(self, rows: Tensor | None = None) -> None:
        """Takes note of weights that have changed.

        Args:
            rows: the features (int64) whose weights changed; default all.
        """

    def topk(self, x: Tensor, k: int, *, check_finite: bool = True) -> SparseCodes:
        """As :func:`ops.topk` of the pre-activations of ``x [..., d_in]``; no gradient flows."""
        return topk(self._pre_activations(x), k, check_finite=check_finite)

    def batch_topk(self, x: Tensor, k: int, *, check_finite: bool = True) -> SparseCodes:
        """As :func:`ops.batch_topk` of the pre-activations of ``x [..., d_in]``."""
        return batch_topk(self._pre_activations(x), k, check_finite=check_finite)

    def threshold(
        self, x: Tensor, threshold_: Tensor | float, *, check_finite: bool = True
    ) -> SparseCodes:
        """As :func:`ops.threshold` of the pre-activations of ``x [..., d_in]``."""
        return threshold(self._pre_activations(x), threshold_, check_finite=check_finite)

    @torch.no_grad()
    def _pre_activations(self, x: Tensor) -> Tensor:
        # Two steps, each rounded, as the release does.
        return x @ self._W.T + self._b
