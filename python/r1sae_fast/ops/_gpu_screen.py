"""The 8-bit copy of weights on a GPU, with the interface of Rust's ``_core.Screen``."""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.ops import int8
from r1sae_fast.ops._common import RawCodes

__all__ = ["GpuScreen"]


class GpuScreen:
    """Rounded weights and a tally; empty until :meth:`refresh`.

    Args:
        W_features: float32 ``[d_sae, d_in]``, contiguous. Kept, not copied, as is b_enc.
        b_enc: float32 ``[d_sae]``.
    """

    kernel = "triton"

    def __init__(self, W_features: Tensor, b_enc: Tensor) -> None:
        self._W, self._b = W_features, b_enc
        self._rounded: tuple[Tensor, Tensor, Tensor] | None = None
        self._rows = 0
        self._counts = torch.zeros(3, dtype=torch.int64, device=W_features.device)
        self.first_bad_feature: int | None = None
        """The first whose weights or bias are not finite, or whose length is beyond float32."""

    @torch.inference_mode(False)  # what is made here is written to later, in any mode
    def refresh(self, rows: Tensor | None = None) -> None:
        """Rounds the weights, or those of the features ``rows``."""
        if self._rounded is None or rows is None:
            self._rounded = int8.weights(self._W)
        else:
            rows = rows.to(self._W.device, torch.int64).reshape(-1).clone()
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self._W.shape[0]:
                raise ValueError(f"a row is out of range; expected 0 to {self._W.shape[0] - 1}")
            for whole, part in zip(self._rounded, int8.weights(self._W[rows]), strict=True):
                whole.index_copy_(0, rows, part)
        # A NaN or an infinity among weights shows in their length.
        bad = ~(self._rounded[2].isfinite() & self._b.isfinite())
        self.first_bad_feature = int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else None

    @property
    def nbytes(self) -> int:
        """Of the copy."""
        return sum(tensor.nbytes for tensor in self._rounded or ())

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Rows encoded, exact products, rows computed whole, bounds violated."""
        candidates, exact_rows, violations = self._counts.tolist()
        return self._rows, candidates, exact_rows, violations

    def encode(self, x: Tensor, rule: str, choice: int | Tensor, check_finite: bool) -> RawCodes:
        """Codes of ``x [rows, d_in]``; ``choice`` is k, or the threshold ``[1]`` or ``[d_sae]``."""
        assert self._rounded is not None
        k, threshold = (0, choice) if isinstance(choice, Tensor) else (choice, self._b[:1])
        *codes, counts = int8.encode(
            x, self._W, self._b, *self._rounded, rule, k, threshold, check_finite
        )
        self._rows += x.shape[0]
        self._counts = self._counts + counts
        values, indices, row_offsets = codes
        return values, indices, row_offsets
