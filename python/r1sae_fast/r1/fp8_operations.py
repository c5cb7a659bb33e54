"""R1's w8a8 products as operations, ``torch.ops.r1sae_fast.fp8_*``: one node each in a graph.

Plain torch's formulas on every device, Triton's kernels on CUDA. They pass no gradient: what is
rounded to fp8 has none.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from r1sae_fast.ops._register import register
from r1sae_fast.r1.fp8 import FP8_DTYPE
from r1sae_fast.r1.fp8_linear import ReferenceKernels

__all__ = ["KERNELS", "OperationKernels"]

_REFERENCE = ReferenceKernels()


def _quantize(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return _REFERENCE.quantize_activations(x, group_size)


def _quantize_fake(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = (x.shape[-1] + group_size - 1) // group_size
    scales = x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FP8_DTYPE), scales


def _linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    scale_inv: Tensor,
    block_size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    rows, columns = block_size
    return _REFERENCE.linear(values, scales, weight, scale_inv, (rows, columns), dtype)


def _linear_fake(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    scale_inv: Tensor,
    block_size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=dtype)


def _grouped(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    scale_inv: Tensor,
    counts: Tensor,
    block_size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    size = (block_size[0], block_size[1])
    return _REFERENCE.grouped_linear(values, scales, weight, scale_inv, counts, size, dtype)


def _grouped_fake(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    scale_inv: Tensor,
    counts: Tensor,
    block_size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty(values.shape[0], weight.shape[1], dtype=dtype)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _no_gradient(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        'products in fp8 pass no gradient; load R1 with fp8="dequantize" to differentiate'
    )


_PRODUCT = "Tensor values, Tensor scales, Tensor weight, Tensor scale_inv"
_quantize_operation = register(
    "fp8_act_quant(Tensor x, int group_size) -> (Tensor, Tensor)",
    reference=_quantize,
    cpu=_quantize,
    fake=_quantize_fake,
    setup_context=_save_nothing,
    backward=_no_gradient,
)
_linear_operation = register(
    f"fp8_linear({_PRODUCT}, int[] block_size, ScalarType dtype) -> Tensor",
    reference=_linear,
    cpu=_linear,
    fake=_linear_fake,
    setup_context=_save_nothing,
    backward=_no_gradient,
)
_grouped_operation = register(
    f"fp8_grouped_linear({_PRODUCT}, Tensor counts, int[] block_size, ScalarType dtype) -> Tensor",
    reference=_grouped,
    cpu=_grouped,
    fake=_grouped_fake,
    setup_context=_save_nothing,
    backward=_no_gradient,
)


class OperationKernels:
    """Implements :class:`r1sae_fast.r1.fp8_linear.Fp8Kernels` by the operations."""

    def quantize_activations(self, x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """``(float8_e4m3fn [..., channels], float32 [..., groups])``."""
        values, scales = _quantize_operation(x, group_size)
        return values, scales

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
        product: Tensor = _linear_operation(values, scales, weight, scale_inv, block_size, dtype)
        return product

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
        product: Tensor = _grouped_operation(
            values, scales, weight, scale_inv, counts, block_size, dtype
        )
        return product


def _kernels() -> Any:
    from r1sae_fast.triton_kernels.fp8_kernels import TritonFp8Kernels

    return TritonFp8Kernels()


def _quantize_cuda(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    quantised: tuple[Tensor, Tensor] = _kernels().quantize_activations(x.contiguous(), group_size)
    return quantised


def _linear_cuda(*arguments: Any) -> Tensor:
    *given, size, dtype = arguments
    product: Tensor = _kernels().linear(*given, (size[0], size[1]), dtype)
    return product


def _grouped_cuda(*arguments: Any) -> Tensor:
    *given, size, dtype = arguments
    product: Tensor = _kernels().grouped_linear(*given, (size[0], size[1]), dtype)
    return product


_Library: Any = torch.library.Library  # torch's class has no types
_LIBRARY = _Library("r1sae_fast", "IMPL")
KERNELS = {
    "fp8_act_quant": _quantize_cuda,
    "fp8_linear": _linear_cuda,
    "fp8_grouped_linear": _grouped_cuda,
}
"""By operation."""

for _name, _function in KERNELS.items():
    _LIBRARY.impl(_name, _function, "CUDA")
