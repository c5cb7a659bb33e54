"""Products of fp8 weights with fp8 activations ("w8a8"), as R1 was trained and is served.

y[t, n] = sum over blocks of 128 channels of (q_x[t] . q_w[n]) * s_x[t] * s_w[n], each block's
product and the sum in float32. Source: DeepSeek-V3 technical report, arXiv:2412.19437, 3.3.2.

:func:`block_fp8_linear_reference` is that formula. Where a device has kernels for it
(:func:`register_fp8_kernels`) they are called; elsewhere, the CPU among them, the product is that
of the dequantised activations with the dequantised weights, in the activations' dtype: the same
sum with the scales multiplied in beforehand. In float32 it differs from the reference by
float32's rounding, in bfloat16 by that of the operands to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1sae_fast.ops._device import has_triton
from r1sae_fast.r1.act_quant import fake_quantize_activations, quantize_activations
from r1sae_fast.r1.fp8 import BLOCK_SIZE, FP8_DTYPE, dequantize_blocks, scale_shape

WeightCache = Literal["once", "call"]
"""Dequantise a weight at its first use and keep it, or at every call."""


class Quantized(NamedTuple):
    """Activations ready for a w8a8 product, which may serve several products.

    ``values`` float8_e4m3fn [..., channels] and ``scales`` float32 [..., groups] where the device
    has kernels; else ``values`` are the dequantised ones and ``scales`` is None. ``dtype`` is
    that of the activations, and of what is computed from them.
    """

    values: Tensor
    scales: Tensor | None
    dtype: torch.dtype


class Fp8Kernels(Protocol):
    """What a device's kernels provide. All tensors are contiguous but for the weights of
    ``grouped_linear``, whose experts may lie apart; ``block_size`` is (128, 128) in R1."""

    def quantize_activations(self, x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """As :func:`r1sae_fast.r1.act_quant.quantize_activations`, x [rows, channels]."""

    def linear(
        self,
        values: Tensor,
        scales: Tensor,
        weight: Tensor,
        scale_inv: Tensor,
        block_size: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """[rows, channels] fp8 by weight [outputs, channels] fp8 to [rows, outputs] ``dtype``."""

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
        """Rows sorted by expert, ``counts`` int64 [experts] of them each (some may be 0), by
        weight [experts, outputs, channels]; to [rows, outputs] ``dtype``."""


_KERNELS: dict[str, Fp8Kernels | None] = {}


def register_fp8_kernels(device_type: str, kernels: Fp8Kernels | None) -> None:
    """Has w8a8 products on devices of this type ("cuda") done by ``kernels``; None: no longer."""
    _KERNELS[device_type] = kernels


def fp8_kernels(device: torch.device) -> Fp8Kernels | None:
    """The kernels of a device: on GPUs Triton's, where it is installed, unless others were
    registered."""
    if device.type == "cuda" and "cuda" not in _KERNELS:
        _KERNELS["cuda"] = _triton_kernels()
    return _KERNELS.get(device.type)


def _triton_kernels() -> Fp8Kernels | None:
    if not has_triton():
        return None
    from r1sae_fast.r1.fp8_operations import OperationKernels

    return OperationKernels()


class ReferenceKernels:
    """The formulas in plain torch, on any device: the truth that kernels are tested against."""

    def quantize_activations(self, x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """See :class:`Fp8Kernels`."""
        return quantize_activations(x, group_size)

    def linear(
        self,
        values: Tensor,
        scales: Tensor,
        weight: Tensor,
        scale_inv: Tensor,
        block_size: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """See :class:`Fp8Kernels`."""
        outputs, channels = weight.shape
        row_scales = scale_inv.repeat_interleave(block_size[0], 0)[:outputs]
        total = values.new_zeros(*values.shape[:-1], outputs, dtype=torch.float32)
        for block, start in enumerate(range(0, channels, block_size[1])):
            part = slice(start, start + block_size[1])
            product = values[..., part].float() @ weight[:, part].float().T
            total += product * scales[..., block, None] * row_scales[:, block]
        return total.to(dtype)

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
        """See :class:`Fp8Kernels`."""
        parts = zip(
            torch.split(values, counts.tolist()),
            torch.split(scales, counts.tolist()),
            weight,
            scale_inv,
            strict=True,
        )
        return torch.cat([self.linear(*part, block_size, dtype) for part in parts])


def block_fp8_linear_reference(
    x: Tensor, weight: Tensor, scale_inv: Tensor, block_size: tuple[int, int] = BLOCK_SIZE
) -> Tensor:
    """x [..., channels] by an fp8 weight [outputs, channels], in plain torch: the truth.

    ``scale_inv`` is float32 [ceil(outputs / 128), ceil(channels / 128)]. The result
    [..., outputs] is rounded once, from float32 to ``x``'s dtype.
    """
    kernels = ReferenceKernels()
    quantised = kernels.quantize_activations(x, block_size[1])
    return kernels.linear(*quantised, weight, scale_inv, block_size, x.dtype)


def prepare(x: Tensor, block_size: tuple[int, int] = BLOCK_SIZE) -> Quantized:
    """Quantises activations once for all products that they enter."""
    kernels = fp8_kernels(x.device)
    if kernels is None:
        return Quantized(fake_quantize_activations(x, block_size[1]), None, x.dtype)
    return Quantized(*kernels.quantize_activations(x.contiguous(), block_size[1]), x.dtype)


def block_fp8_linear(
    x: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor,
    block_size: tuple[int, int] = BLOCK_SIZE,
    dense: Callable[[torch.dtype], Tensor] | None = None,
) -> Tensor:
    """x [..., channels] by an fp8 weight [outputs, channels], by the device's kernels if any.

    Args:
        x: activations, or what :func:`prepare` made of them.
        weight: float8_e4m3fn.
        scale_inv: float32 [ceil(outputs / 128), ceil(channels / 128)].
        block_size: (128, 128) in R1.
        dense: gives the dequantised weight where the caller keeps it.

    Returns:
        [..., outputs] in the dtype of the activations.
    """
    if isinstance(x, Tensor):
        x = prepare(x, block_size)
    if x.scales is None:
        restored = (
            dequantize_blocks(weight, scale_inv, x.dtype, block_size)
            if dense is None
            else dense(x.dtype)
        )
        return F.linear(x.values, restored)
    kernels = fp8_kernels(x.values.device)
    if kernels is None:
        raise RuntimeError(
            f"the activations were quantised for kernels of {x.values.device.type!r}, "
            "which are no longer registered; prepare them again"
        )
    return kernels.linear(x.values, x.scales, weight, scale_inv, block_size, x.dtype)


class Fp8Linear(nn.Module):
    """A linear layer whose weight stays in block fp8; parameters ``weight`` and
    ``weight_scale_inv`` as in R1's checkpoint, yet to be filled."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device | str | None = None,
        *,
        block_size: tuple[int, int] = BLOCK_SIZE,
        weight_cache: WeightCache = "call",
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.weight_cache: WeightCache = weight_cache
        self.weight = frozen((outputs, inputs), device, FP8_DTYPE)
        self.weight_scale_inv = frozen(
            scale_shape((outputs, inputs), block_size), device, torch.float32
        )
        self._dense: Tensor | None = None

    def prepare(self, x: Tensor) -> Quantized:
        """``x`` quantised, for this layer and others of the same input."""
        return prepare(x, self.block_size)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight [outputs, inputs]."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        dense = dequantize_blocks(self.weight, self.weight_scale_inv, dtype, self.block_size)
        if self.weight_cache == "once":
            self._dense = dense
        return dense

    def forget_dense(self) -> None:
        """To be called when the weight has been filled anew."""
        self._dense = None

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """[..., inputs] to [..., outputs] in the dtype of ``x``."""
        return block_fp8_linear(x, self.weight, self.weight_scale_inv, self.block_size, self.dense)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        self.forget_dense()
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's
        return self


def frozen(
    shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype
) -> nn.Parameter:
    """An empty parameter without gradient, which fp8 numbers can't have."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)


def keeping_dtype(fn: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``Module.to``, ``.bfloat16()`` and the like, with the device moved only: an
    fp8 code in another dtype is a wrong weight."""

    def moved(tensor: Tensor) -> Tensor:
        result: Tensor = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved
