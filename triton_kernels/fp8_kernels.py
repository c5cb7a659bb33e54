"""What R1's forward asks of a GPU for its fp8 layers: the kernels as one object.

Implements :class:`r1sae_fast.r1.fp8_linear.Fp8Kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.r1.fp8_linear import ReferenceKernels
from r1sae_fast.triton_kernels.act_quant import GROUP, act_quant
from r1sae_fast.triton_kernels.block_fp8_gemm import (
    BLOCK,
    block_fp8_gemm,
    grouped_block_fp8_gemm,
)

__all__ = ["TritonFp8Kernels"]


class TritonFp8Kernels:
    """Blocks of 128, as R1 has them; other sizes take the formulas in plain torch."""

    def __init__(self) -> None:
        self.reference = ReferenceKernels()

    def quantize_activations(self, x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """``(float8_e4m3fn [rows, channels], float32 [rows, groups])``."""
        if group_size != GROUP:
            return self.reference.quantize_activations(x, group_size)
        values, scales = act_quant(x.reshape(-1, x.shape[-1]))
        return values.view(x.shape), scales.view(*x.shape[:-1], scales.shape[-1])

    def linear(
        self,
        values: Tensor,
        scales: Tensor,
        weight: Tensor,
        scale_inv: Tensor,
        block_size: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """``[..., channels]`` by ``[outputs, channels]`` to ``[..., outputs]``."""
        if block_size != (BLOCK, BLOCK):
            return self.reference.linear(values, scales, weight, scale_inv, block_size, dtype)
        flat, flat_scales = (
            values.reshape(-1, values.shape[-1]),
            scales.reshape(-1, scales.shape[-1]),
        )
        output = block_fp8_gemm(flat, flat_scales, weight, scale_inv, dtype)
        return output.view(*values.shape[:-1], output.shape[-1])

    def grouped_linear(
        self,
        values: Tensor,
        scales: Tensor,
        weight: Tensor,
        scale_inv: Tensor,
        counts: Tensor,
        block_size: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """Rows sorted by expert, ``counts`` of them each."""
        if block_size != (BLOCK, BLOCK):
            return self.reference.grouped_linear(
                values, scales, weight, scale_inv, counts, block_size, dtype
            )
        offsets = counts.new_zeros(counts.shape[0] + 1)
        torch.cumsum(counts, 0, out=offsets[1:])
        return grouped_block_fp8_gemm(values, scales, weight, scale_inv, offsets, dtype=dtype)
