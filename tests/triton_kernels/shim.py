"""Mends what triton's interpreter gets wrong, and makes it stricter than a GPU.

The interpreter keeps bfloat16 as its bits: dots and sums of it are of integers; it cuts float32
down to bfloat16 and loses carries on the way to fp8. ``install`` has torch do those conversions,
lets no arithmetic on bfloat16 pass (our kernels cast to float32 right after the load), and runs the
programs of a grid in random order, as a GPU may. ``test_shim.py`` shows that each is needed and
right.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ARITHMETIC = [
    "create_fadd",
    "create_fsub",
    "create_fmul",
    "create_fdiv",
    "create_frem",
    "create_fneg",
    "create_precise_divf",
    "create_minimumf",
    "create_minnumf",
    "create_maximumf",
    "create_maxnumf",
    "create_fma",
    "create_clampf",
    "create_exp",
    "create_exp2",
    "create_log",
    "create_log2",
    "create_sqrt",
    "create_rsqrt",
    "create_cos",
    "create_sin",
    "create_fcmpOLT",
    "create_fcmpOGT",
    "create_fcmpOLE",
    "create_fcmpOGE",
    "create_fcmpOEQ",
    "create_fcmpONE",
    "create_fcmpULT",
    "create_fcmpUGT",
    "create_fcmpULE",
    "create_fcmpUGE",
    "create_fcmpUEQ",
    "create_fcmpUNE",
]


class GridOrder:
    """The order of the programs of a grid; ``seed`` None runs them in turn."""

    seed: int | None = 0


def to_torch(data: Any, dtype: Any) -> torch.Tensor:
    """An interpreter's array, as a torch tensor of the dtype that it stands for."""
    bits = np.array(data, order="C").view(_BITS[np.asarray(data).dtype.itemsize])
    signed = bits.view(f"i{bits.dtype.itemsize}")
    return torch.from_numpy(signed).view(_TORCH[dtype])


def from_torch(tensor: torch.Tensor, dtype: Any) -> Any:
    """The way back."""
    width = tensor.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return tensor.contiguous().view(integers).numpy().view(interpreter._get_np_dtype(dtype))


def convert(data: Any, source: Any, target: Any) -> Any:
    """One float dtype to another, as torch rounds it (to nearest, ties to even)."""
    return from_torch(to_torch(data, source).to(_TORCH[target]), target)


def _is_odd(dtype: Any) -> bool:
    """A float whose bits numpy takes for integers."""
    return dtype.scalar in (tl.bfloat16, tl.float8e4nv, tl.float8e5)


def install(patch: Any) -> None:
    """Patches the interpreter; ``patch`` is pytest's monkeypatch."""
    builder = interpreter.InterpreterBuilder
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_odd(source.dtype) or _is_odd(target):
            kind, wanted = source.dtype.scalar, target.scalar
            if kind not in _TORCH:  # an integer, to bfloat16 or fp8
                source = plain_cast(self, source, tl.float32)
                kind = tl.float32
            if wanted not in _TORCH:
                widened = interpreter.TensorHandle(
                    convert(source.data, kind, tl.float32), tl.float32
                )
                return plain_cast(self, widened, target)
            return interpreter.TensorHandle(convert(source.data, kind, wanted), wanted)
        return plain_cast(self, source, target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        return cast_impl(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        widened = [
            interpreter.TensorHandle(convert(side.data, side.dtype.scalar, tl.float32), tl.float32)
            if _is_odd(side.dtype)
            else side
            for side in (a, b)
        ]
        return plain_dot(self, *widened, d, *options)

    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "create_fp_to_fp", fp_to_fp)
    patch.setattr(builder, "create_dot", create_dot)
    for name in _ARITHMETIC:
        if hasattr(builder, name):
            patch.setattr(builder, name, _forbidding(name, getattr(builder, name)))
    _shuffle(patch, builder)


def _forbidding(name: str, plain: Any) -> Any:
    def operation(self: Any, *arguments: Any) -> Any:
        for argument in arguments:
            dtype = getattr(argument, "dtype", None)
            if dtype is not None and _is_odd(dtype):
                raise AssertionError(f"{name[7:]} of {dtype}: cast to float32 after the load")
        return plain(self, *arguments)

    return operation


def _shuffle(patch: Any, builder: Any) -> None:
    plain_dim, plain_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def set_grid_dim(self: Any, *size: int) -> None:
        plain_dim(self, *size)
        order[:] = range(int(np.prod(size)))
        if GridOrder.seed is not None:
            random.Random(GridOrder.seed).shuffle(order)

    def set_grid_idx(self: Any, *index: int) -> None:
        number = order[int(np.ravel_multi_index(index, self.grid_dim))]
        plain_index(self, *(int(part) for part in np.unravel_index(number, self.grid_dim)))

    patch.setattr(builder, "set_grid_dim", set_grid_dim)
    patch.setattr(builder, "set_grid_idx", set_grid_idx)
