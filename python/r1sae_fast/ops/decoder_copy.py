"""A copy of decoder weights in 16 bits, for decoding at twice the speed of float32."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from r1sae_fast.ops._memory import empty_weights

__all__ = ["COPY_DTYPES", "DecoderCopy"]

COPY_DTYPES = (torch.float16, torch.bfloat16)
# Rows that are checked at once.
_ROWS = 1024


class DecoderCopy:
    """Keeps a copy of float32 weights, made again whenever torch counts a change of theirs.

    Args:
        dtype: ``torch.float16`` (11 bits of precision, up to 65504) or ``torch.bfloat16`` (8 bits).

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in COPY_DTYPES:
            raise ValueError(f"a decoder copy in {dtype}; expected torch.float16 or torch.bfloat16")
        self.dtype = dtype
        # Of weights that are gone, neither address nor version tells them from later ones.
        self._owners: tuple[weakref.ref[object], ...] = ()
        self._state: tuple[object, ...] | None = None
        self._copy: Tensor | None = None

    def of(self, W_dec: Tensor) -> Tensor:
        """``W_dec`` (``[d_sae, d_in]``, any strides) in this dtype, contiguous.

        Raises:
            ValueError: a number that is too large for float16; names the feature.
        """
        state = (W_dec.data_ptr(), W_dec._version, tuple(W_dec.shape), W_dec.stride())
        owners = (W_dec, W_dec.untyped_storage())
        known = [owner() for owner in self._owners]
        is_same = len(known) == 2 and all(a is b for a, b in zip(known, owners, strict=True))
        if self._copy is None or state != self._state or not is_same:
            self._state, self._copy = None, None
            self._copy = self._made(W_dec.detach())
            self._state = state
            self._owners = tuple(weakref.ref(owner) for owner in owners)
        return self._copy

    def _made(self, W_dec: Tensor) -> Tensor:
        # In memory both are 16 bits; large pages are asked for by way of bfloat16.
        copy = empty_weights(*W_dec.shape, dtype=torch.bfloat16).view(self.dtype)
        for start in range(0, W_dec.shape[0], _ROWS):
            part, given = copy[start : start + _ROWS], W_dec[start : start + _ROWS]
            part.copy_(given)
            lost = (part.isinf() & ~given.isinf()).any(1)
            if bool(lost.any()):
                feature = start + int(lost.to(torch.uint8).argmax())
                raise ValueError(
                    f"feature {feature} of W_dec holds numbers too large for {self.dtype}; "
                    "use torch.bfloat16, or no copy"
                )
        return copy
