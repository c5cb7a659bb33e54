"""Routed experts whose weights stay in block fp8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from r1sae_fast.r1.act_quant import fake_quantize_activations
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import BLOCK_SIZE, FP8_DTYPE, dequantize_blocks, scale_shape
from r1sae_fast.r1.fp8_linear import (
    Fp8Kernels,
    WeightCache,
    fp8_kernels,
    frozen,
    keeping_dtype,
)
from r1sae_fast.r1.moe import Experts


class Fp8Experts(Experts):
    """As :class:`Experts`, in float8_e4m3fn, with float32 scales ``gate_up_scale_inv``
    [experts, 2 * ceil(inter / 128), ceil(hidden / 128)] (the gate's, then the up projection's,
    each counted from its own first row) and ``down_scale_inv``
    [experts, ceil(hidden / 128), ceil(inter / 128)]."""

    def __init__(
        self,
        config: R1Config,
        device: torch.device | str | None = None,
        *,
        count: int | None = None,
        block_size: tuple[int, int] = BLOCK_SIZE,
        weight_cache: WeightCache = "call",
    ) -> None:
        super().__init__(config, "meta", FP8_DTYPE, count)
        self.block_size = block_size
        self.weight_cache: WeightCache = weight_cache
        self.inter = config.moe_intermediate_size
        count, rows, width = self.gate_up.shape
        up_grid = scale_shape((self.inter, width), block_size)
        down_grid = scale_shape((width, self.inter), block_size)
        self.gate_up = frozen((count, rows, width), device, FP8_DTYPE)
        self.down = frozen((count, width, self.inter), device, FP8_DTYPE)
        self.gate_up_scale_inv = frozen((count, 2 * up_grid[0], up_grid[1]), device, torch.float32)
        self.down_scale_inv = frozen((count, *down_grid), device, torch.float32)
        self._stacked: tuple[Tensor, Tensor] | None = None

    def quantize(self, x: Tensor) -> Tensor:
        """What the products see in place of ``x``."""
        return fake_quantize_activations(x, self.block_size[1])

    def expert(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One expert's dequantised (gate_up, down)."""
        if self._stacked is not None and self._stacked[0].dtype == dtype:
            return self._stacked[0][index], self._stacked[1][index]
        return self._dequantize(
            index,
            self.gate_up.new_empty(self.gate_up.shape[1:], dtype=dtype),
            self.down.new_empty(self.down.shape[1:], dtype=dtype),
        )

    def _dequantize(self, index: int, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        for weight, scales, out in (
            *zip(
                self.gate_up[index].chunk(2),
                self.gate_up_scale_inv[index].chunk(2),
                gate_up.chunk(2),
                strict=True,
            ),
            (self.down[index], self.down_scale_inv[index], down),
        ):
            dequantize_blocks(weight, scales, out.dtype, self.block_size, out)
        return gate_up, down

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """All experts' dequantised weights, None where they are not kept."""
        if self.weight_cache == "call" or fp8_kernels(self.gate_up.device) is not None:
            return None
        if self._stacked is None or self._stacked[0].dtype != dtype:
            self._stacked = None
            gate_up = self.gate_up.new_empty(self.gate_up.shape, dtype=dtype)
            down = self.down.new_empty(self.down.shape, dtype=dtype)
            for index in range(gate_up.shape[0]):
                self._dequantize(index, gate_up[index], down[index])
            self._stacked = gate_up, down
        return self._stacked

    def forget_dense(self) -> None:
        """To be called when the weights have been filled anew."""
        self._stacked = None

    def add_part(
        self, total: Tensor, x: Tensor, experts: Tensor, weights: Tensor, first: int = 0
    ) -> None:
        """See :meth:`Experts.add_part`."""
        kernels = fp8_kernels(x.device)
        if kernels is None:
            super().add_part(total, x, experts, weights, first)
        else:
            self._add_by_kernels(kernels, total, x, experts, weights, first)

    def _add_by_kernels(
        self,
        kernels: Fp8Kernels,
        total: Tensor,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        first: int,
    ) -> None:
        count, k = self.gate_up.shape[0], experts.shape[1]
        experts, by_number = experts.sort(-1)
        weights = weights.gather(-1, by_number)
        chosen = experts.flatten() - first
        outside = (chosen < 0) | (chosen >= count)
        order = torch.where(outside, count, chosen).argsort(stable=True)
        counts = torch.bincount(chosen[~outside], minlength=count)
        order = order[: chosen.shape[0] - int(outside.sum())]
        values, scales = kernels.quantize_activations(x.contiguous(), self.block_size[1])
        values, scales = values[order // k], scales[order // k]
        gate, up = (
            kernels.grouped_linear(values, scales, weight, grid, counts, self.block_size, x.dtype)
            for weight, grid in zip(
                self.gate_up.chunk(2, 1), self.gate_up_scale_inv.chunk(2, 1), strict=True
            )
        )
        inner = kernels.quantize_activations(F.silu(gate) * up, self.block_size[1])
        outputs = kernels.grouped_linear(
            *inner, self.down, self.down_scale_inv, counts, self.block_size, x.dtype
        )
        # Where a slot's expert is not among these, a row of zeros.
        rows = torch.full_like(chosen, outputs.shape[0])
        rows[order] = torch.arange(order.shape[0], device=order.device)
        slots = torch.cat((outputs, outputs.new_zeros(1, outputs.shape[1])))
        rows = rows.view(experts.shape)
        for slot in range(k):  # in ascending order of experts, without atomics
            total += slots[rows[:, slot]] * weights[:, slot, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Experts:
        self.forget_dense()
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's
        return self
