"""Which screen ``"auto"`` takes for which weights, and the measurements behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.ops import _device

__all__ = ["best_screen", "choose", "most_copy_bytes"]

# Measured on two cores of an Intel Xeon with AMX, 7168 x 28672, k 64, weights without a tail (the
# hardest to bound), us a row of encoding; dense is torch's product and our selection:
#   rows    float32 dense  int8   bfloat16 dense  int8
#   1024             1400   230              250   180
#     64             2350   450              690   350
#      1            32800  9000            15900  8900
# Screens of bf16 took 540 and 350 at 1024 rows, 16200 and 15900 at one: never the fastest.
# Below so many weights the dense path is as fast or faster for most numbers of rows. They meet in
# float32 at about 512 x 8192 (1024, 64, 1 rows: screening is 2.0, 2.2, 0.85 times as fast), in
# bfloat16 at 2048 x 16384 (1.15, 1.1, 0.85); at 256 x 4096 it takes up to three times as long.
_FEWEST_WEIGHTS = {torch.float32: 1 << 22, torch.bfloat16: 1 << 25}
# So it is where rows are few; 2048 rows take half the time with a screen (256 x 4096: 16 ms, dense
# 33; one row 0.33 and 0.23), so whoever knows that rows are many has it from fewer weights on.
_FEWEST_OF_ALL = 1 << 20
_MANY_ROWS = 512
# Short rows are another matter, as rounding them to 8 bits takes as long as their products: by
# screens of bf16 2048 float32 rows of 256 numbers, 4096 features, take 15 ms instead of 18 (512 and
# 8192: 32 instead of 36; 768: 78 instead of 72), and rounding the weights anew, which a step of
# training does, half the time. 256 x 4096 and more features, so, are screened from 2^20 weights on
# whoever asks: dense takes 1.9 times as long at 256 rows, as long at 64, 0.6 of it at one.
_SHORT_ROWS = 512
_WIDE = 4096
# Kernels that beat torch's products; without VNNI 8-bit products are little faster than float32's.
_FAST_KERNELS = ("amx_int8", "avx512_vnni", "avx_vnni")
_FAST_COARSE_KERNELS = ("amx_bf16",)


def best_screen(dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The kind that ``"auto"`` takes on this CPU for large weights of ``dtype``, and its kernel:
    such that a feature has more than 512 numbers.

    Raises:
        ValueError: ``R1SAE_SIMD`` names no level of this CPU.
    """
    kernel = _core.screen_kernels()[0]
    if kernel in _FAST_KERNELS and dtype in (torch.float32, torch.bfloat16):
        return "int8", kernel
    return "none", ""


def most_copy_bytes(d_in: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes a weight, at most, of the copy that ``"auto"`` makes of weights of ``dtype``."""
    if best_screen(dtype)[0] == "none":
        return 0
    return 2 if d_in <= _SHORT_ROWS and dtype == torch.float32 else 1


def choose(W: Tensor, kernel: str, rows: int) -> tuple[str, str]:
    """The kind for weights ``[d_sae, d_in]`` that can be screened, and why: by products of
    ``kernel`` (or ``"auto"``), where about so many rows at a time are sure to come."""
    d_sae, d_in = W.shape
    coarse = _core.screen_kernels("bf16")[0]
    short = d_in <= _SHORT_ROWS and W.dtype == torch.float32
    short &= coarse in _FAST_COARSE_KERNELS
    many = rows >= _MANY_ROWS and W.dtype == torch.float32
    fewest = _FEWEST_WEIGHTS.get(W.dtype, 0)
    if _device.on_gpu(W) or many or (short and d_sae >= _WIDE):
        fewest = _FEWEST_OF_ALL
    if W.numel() < fewest:
        return "none", f"fewer than {fewest} weights: a dense product is as fast"
    if _device.on_gpu(W):
        return "int8", "8-bit products on tensor cores; float32 has none"
    if kernel in _core.screen_kernels("bf16")[1]:
        return "bf16", "products of bf16 by the kernel asked for"
    if kernel != "auto":
        return "int8", "8-bit products by the kernel asked for"
    kind, fastest = best_screen(W.dtype)
    if kind == "none":
        return "none", "this CPU has no fast 8-bit products (AMX or VNNI)"
    if short:
        return "bf16", f"rows of {d_in} are too short for 8 bits to pay beside {coarse}"
    return "int8", f"8-bit products by {fastest} are the fastest here"
