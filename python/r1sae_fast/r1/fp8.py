"""Block-scaled fp8 weights, as DeepSeek-V3 and R1 store them.

A weight is kept in float8 e4m3 with one float32 scale for each block of 128 x 128 entries; the
scale's name, ``weight_scale_inv``, means "multiply by this to get the weight back":
w = q * scale_inv. Blocks at the lower and right edge may be smaller (kv_a_proj_with_mqa has 576
rows, hence 5 rows of scales). Source: DeepSeek-V3 technical report, arXiv:2412.19437, 3.3.

The ``*_reference`` functions are the truth in plain torch; on the CPU, Rust does the same to the
bit, some thirty times faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1sae_fast import _core

BLOCK_SIZE = (128, 128)
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max


def scale_shape(
    shape: tuple[int, ...] | torch.Size, block_size: tuple[int, int] = BLOCK_SIZE
) -> tuple[int, int]:
    """Shape of the scales of a weight [rows, columns]: blocks, counted by ceil division."""
    rows, columns = shape
    return -(-rows // block_size[0]), -(-columns // block_size[1])


def in_rust(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether Rust computes with a tensor, to or from floats of ``dtype``."""
    return tensor.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def array(tensor: Tensor) -> NDArray[Any]:
    """A contiguous matrix as numpy knows it, without a copy: bf16 as uint16, fp8 as uint8."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif tensor.dtype == FP8_DTYPE:
        tensor = tensor.view(torch.uint8)
    # Norms come here in every step, and detaching costs as much as the rest.
    found: NDArray[Any] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return found


def quantize_blocks(
    weight: Tensor, block_size: tuple[int, int] = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """Quantises a weight [rows, columns] of any floating dtype.

    Returns:
        ``(quantised, scale_inv)``: float8_e4m3fn [rows, columns] and float32
        [ceil(rows / 128), ceil(columns / 128)]. A block's largest magnitude becomes 448, the
        largest e4m3 number; a block of zeros keeps the scale 1.

    Raises:
        ValueError: the weight is not a matrix, or holds a NaN or an infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"block fp8 quantises matrices, found the shape {tuple(weight.shape)}")
    if not in_rust(weight, weight.dtype):
        return quantize_blocks_reference(weight, block_size)
    quantised = torch.empty(weight.shape, dtype=FP8_DTYPE)
    scales = torch.empty(scale_shape(weight.shape, block_size))
    _core.fp8_quantize_blocks(
        array(weight.contiguous()),
        block_size,
        array(quantised),
        array(scales),
        torch.get_num_threads(),
    )
    return quantised, scales


def quantize_blocks_reference(
    weight: Tensor, block_size: tuple[int, int] = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_blocks` in plain torch."""
    if not torch.isfinite(weight).all():
        row = int((~torch.isfinite(weight)).any(-1).nonzero()[0])
        raise ValueError(f"row {row} of the weight holds a NaN or an infinity; nothing quantised")
    rows, columns = weight.shape
    grid = scale_shape(weight.shape, block_size)
    padded = weight.new_zeros(grid[0] * block_size[0], grid[1] * block_size[1], dtype=torch.float32)
    padded[:rows, :columns] = weight
    blocks = padded.view(grid[0], block_size[0], grid[1], block_size[1])
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    # A scale of 0 (zeros, or entries so small that the division underflows) would give 0 / 0.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Rounding in the division may pass 448 by an ulp, which the cast would turn into a NaN.
    scaled = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    quantised = scaled.view_as(padded)[:rows, :columns].to(FP8_DTYPE)
    return quantised.contiguous(), scale


def dequantize_blocks(
    quantised: Tensor,
    scale_inv: Tensor,
    dtype: torch.dtype = torch.float32,
    block_size: tuple[int, int] = BLOCK_SIZE,
    out: Tensor | None = None,
) -> Tensor:
    """The weight [rows, columns] in ``dtype``: q * scale_inv in float32, rounded once.

    ``out``, contiguous and of the result's shape and dtype, is filled and returned where given.

    Raises:
        ValueError: the scales' shape does not fit the weight's.
    """
    expected = scale_shape(quantised.shape, block_size)
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scales of shape {tuple(scale_inv.shape)} for a weight of shape "
            f"{tuple(quantised.shape)}, expected {expected}"
        )
    if not in_rust(quantised, dtype):
        weight = dequantize_blocks_reference(quantised, scale_inv, dtype, block_size)
        return weight if out is None else out.copy_(weight)
    if out is None:
        out = torch.empty(quantised.shape, dtype=dtype)
    _core.fp8_dequantize_blocks(
        array(quantised.contiguous()),
        np.ascontiguousarray(array(scale_inv.float())),
        block_size,
        array(out),
        torch.get_num_threads(),
    )
    return out


def dequantize_blocks_reference(
    quantised: Tensor,
    scale_inv: Tensor,
    dtype: torch.dtype = torch.float32,
    block_size: tuple[int, int] = BLOCK_SIZE,
) -> Tensor:
    """:func:`dequantize_blocks` in plain torch."""
    weight = quantised.to(torch.float32)
    # Row block by row block, so that the scales are never spread to the weight's full size.
    per_column = scale_inv.float().repeat_interleave(block_size[1], 1)[:, : weight.shape[1]]
    for block, scales in enumerate(per_column):
        weight[block * block_size[0] : (block + 1) * block_size[0]] *= scales
    return weight.to(dtype)
