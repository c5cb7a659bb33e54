"""Weights in bfloat16 that steps compute with, beside the float32 ones that learn.

Small steps would be lost in 8 bits of precision, so Adam moves float32 weights ("masters") and the
copies here are rounded from them after each step. Codes are those that an SAE in bfloat16 has (as
the released ones are): x, the encoder, their product and its sum with the bias rounded. Decoding
and the gradients of the codes' values read the rounded decoder and add up in float32; gradients are
taken at the rounded weights and given to the masters. The auxiliary loss, and codes so many that
dense products are faster, read the masters. Copies are a function of the masters alone, so a
checkpoint needs none of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops._memory import empty_weights
from r1sae_fast.train.losses.base import Finder

__all__ = ["RoundedWeights", "WideningFinder"]

_ROWS = 1024
"""Rounded at once where few are."""


class RoundedWeights:
    """The copies of ``parameters``: ``encoder``, ``decoder`` (unless tied) and ``b_enc``."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self._masters = {
            name: parameters[name] for name in ("encoder", "decoder") if name in parameters
        }
        self._bias = parameters["b_enc"]
        self._copies = {
            name: empty_weights(*master.shape, dtype=torch.bfloat16, device=master.device)
            for name, master in self._masters.items()
        }
        self.encoder = self._copies["encoder"]
        """``[d_sae, d_in]``."""
        self.decoder = self._copies.get("decoder", self.encoder)
        """``[d_sae, d_in]``: the encoder when tied."""
        self.b_enc = torch.empty_like(self._bias, dtype=torch.bfloat16)
        self.refresh({})

    def refresh(self, moved: dict[str, Tensor | None]) -> None:
        """Rounds masters again.

        Args:
            moved: of each matrix by name which rows may have moved, ``[rows]`` bool; None, or a
                matrix that is not named: any.
        """
        self.b_enc.copy_(self._bias)
        for name, master in self._masters.items():
            mask, copy = moved.get(name), self._copies[name]
            rows = None if mask is None else mask.nonzero().flatten()
            if rows is None or 2 * rows.numel() > master.shape[0]:
                copy.copy_(master)
                continue
            for some in torch.split(rows, _ROWS):
                copy[some] = master[some].bfloat16()


class WideningFinder:
    """Finds what ``finder`` finds in rows rounded to bfloat16, with values in float32."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder

    def topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """As :func:`r1sae_fast.ops.topk`."""
        return _widened(self._finder.topk(x.bfloat16(), k, check_finite=check_finite))

    def batch_topk(self, x: Tensor, k: int, *, check_finite: bool) -> SparseCodes:
        """As :func:`r1sae_fast.ops.batch_topk`."""
        return _widened(self._finder.batch_topk(x.bfloat16(), k, check_finite=check_finite))

    def threshold(self, x: Tensor, theta: Tensor | float, *, check_finite: bool) -> SparseCodes:
        """As :func:`r1sae_fast.ops.threshold`."""
        return _widened(self._finder.threshold(x.bfloat16(), theta, check_finite=check_finite))


def _widened(codes: SparseCodes) -> SparseCodes:
    return replace(codes, values=codes.values.float())
