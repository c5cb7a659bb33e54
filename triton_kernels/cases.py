"""Calls of every launcher at the shapes that R1 and its SAEs have, on tensors without data.

What ``make aot`` compiles and the tests check. A case says what its machine code must contain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from r1sae_fast.triton_kernels.launch import Launch, recording

__all__ = ["CASES", "Case", "launches"]

D_IN, D_SAE, ROWS, K = 7168, 28672, 4096, 64


@dataclass(frozen=True)
class Case:
    """One call: kernels, dtype and shape class that a user's call compiles."""

    family: str
    name: str
    call: Callable[[], object]
    wants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By target (``cuda``: all of NVIDIA's): instructions of which each must occur at least once
    in the kernel named in ``of``."""
    of: str = ""
    """The kernel that ``wants`` is about; empty: the call's only one."""
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")

    def wanted(self, target: str) -> tuple[str, ...]:
        """Instructions that must occur for ``target``."""
        both = self.wants.get("all", ())
        general = self.wants.get("cuda", ()) if target.startswith("sm_") else ()
        return (*both, *general, *self.wants.get(target, ()))


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without data."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def codes(dtype: torch.dtype, rows: int = ROWS, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices, row_offsets of k codes a row."""
    return (
        meta(rows * k, dtype=dtype),
        meta(rows * k, dtype=torch.int32),
        meta(rows + 1, dtype=torch.int64),
    )


def launches(case: Case, target: str) -> list[Launch]:
    """What the case's call launches for a target."""
    with recording(target) as recorded:
        case.call()
    return recorded


def _decode_cases() -> Iterator[Case]:
    from r1sae_fast.triton_kernels.decode import decode, decode_error

    vector = {"all": ("LDG.128",)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        weight, bias = meta(D_SAE, D_IN, dtype=dtype), meta(D_IN, dtype=dtype)
        x = meta(ROWS, D_IN, dtype=dtype)

        given = codes(dtype)
        yield Case("decode", short, partial(decode, *given, weight, bias), vector)
        errors = partial(decode_error, *given, weight, x, bias)
        yield Case("decode", f"{short}, error", errors, vector)
    fp8, scales = meta(D_SAE, D_IN, dtype=torch.float8_e4m3fn), meta(D_SAE, dtype=torch.float32)
    bf16 = torch.bfloat16
    yield Case(
        "decode",
        "fp8 weights",
        lambda: decode(*codes(bf16), fp8, meta(D_IN, dtype=bf16), scales=scales),
    )
    yield Case(
        "decode",
        "ragged width",
        lambda: decode(*codes(bf16), meta(D_SAE, 7001, dtype=bf16), meta(7001, dtype=bf16)),
    )


def _gradient_cases() -> Iterator[Case]:
    from r1sae_fast.triton_kernels.sparse_grad import (
        FeatureMajor,
        gradient_of_values,
        gradient_of_weight,
    )

    vector = {"all": ("LDG.128",)}
    nnz = ROWS * K
    by_feature = FeatureMajor(
        meta(nnz, dtype=torch.int64),
        meta(nnz, dtype=torch.int32),
        meta(D_SAE + 1, dtype=torch.int64),
    )
    some = meta(512, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        gradient, weight = meta(ROWS, D_IN, dtype=dtype), meta(D_SAE, D_IN, dtype=dtype)
        values, indices, offsets = codes(dtype)
        yield Case(
            "gradient_of_values",
            short,
            partial(gradient_of_values, gradient, indices, offsets, weight),
            vector,
        )
        yield Case(
            "gradient_of_weight",
            short,
            partial(
                gradient_of_weight,
                gradient,
                values,
                by_feature,
                with_sums=True,
                dtype=torch.float32,
            ),
            vector,
        )
        yield Case(
            "gradient_of_weight",
            f"{short}, some features",
            partial(
                gradient_of_weight,
                gradient,
                values,
                by_feature,
                features=some,
            ),
            vector,
        )


R1_LINEAR = {
    "q_a": (1536, 7168),
    "kv_a (ragged)": (576, 7168),
    "o": (7168, 16384),
    "dense up": (18432, 7168),
}
"""R1's own [out, in]."""


def _fp8_cases() -> Iterator[Case]:
    from r1sae_fast.triton_kernels.act_quant import act_quant
    from r1sae_fast.triton_kernels.block_fp8_gemm import block_fp8_gemm, grouped_block_fp8_gemm

    fp8, f32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    cores = {"sm_80": ("HMMA",), "sm_90": ("QGMMA",), "sm_100": ("UTCMMA",), "gfx942": ("MFMA",)}
    for dtype in (bf16, f32):
        short = str(dtype).removeprefix("torch.")
        x = meta(ROWS, D_IN, dtype=dtype)
        yield Case("act_quant", short, partial(act_quant, x), {"all": ("LDG.128",)})
    for rows in (32, ROWS):
        for name, (n, k) in R1_LINEAR.items():
            given = (meta(rows, k, dtype=fp8), meta(rows, -(-k // 128), dtype=f32))
            weight = (meta(n, k, dtype=fp8), meta(-(-n // 128), -(-k // 128), dtype=f32))
            call = partial(block_fp8_gemm, *given, *weight)
            yield Case("block_fp8_gemm", f"{name}, {rows} rows", call, cores)
        for name, (n, k) in {"gate_up": (4096, 7168), "down": (7168, 2048)}.items():
            tokens = rows if name == "gate_up" else 8 * rows
            given = (meta(tokens, k, dtype=fp8), meta(tokens, k // 128, dtype=f32))
            weight = (meta(256, n, k, dtype=fp8), meta(256, n // 128, k // 128, dtype=f32))
            slots = meta(8 * rows, dtype=torch.int64) if name == "gate_up" else None
            offsets = meta(257, dtype=torch.int64)
            call = partial(grouped_block_fp8_gemm, *given, *weight, offsets, slots)
            yield Case("block_fp8_gemm", f"experts' {name}, {rows} tokens", call, cores)


def _encode_cases() -> Iterator[Case]:
    from r1sae_fast.triton_kernels.encode_append import encode_append
    from r1sae_fast.triton_kernels.encode_topk import encode_topk

    cores = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTCMMA",), "gfx942": ("MFMA",)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        x, bias = meta(ROWS, D_IN, dtype=dtype), meta(D_SAE, dtype=dtype)
        wants = cores if dtype != torch.float32 else {}
        layouts = {
            "by feature": meta(D_SAE, D_IN, dtype=dtype).T,
            "by input": meta(D_IN, D_SAE, dtype=dtype),
        }
        for layout, weight in layouts.items():
            for k in (64, 128, 512) if layout == "by feature" else (64,):
                call = partial(encode_topk, x, weight, bias, k, check_finite=True)
                yield Case(
                    "encode_topk", f"{short}, {layout}, k {k}", call, wants, "encode_gemm_kernel"
                )
        if dtype != torch.float32:
            appended = partial(encode_append, x, layouts["by feature"], bias, K)
            yield Case("encode_append", short, appended, cores, "append_kernel")
        ragged = meta(28001, 7001, dtype=dtype).T
        uneven = meta(1000, 7001, dtype=dtype)
        call = partial(encode_topk, uneven, ragged, meta(28001, dtype=dtype), 63)
        yield Case("encode_topk", f"{short}, ragged", call)


def _collect_cases() -> Iterator[Case]:
    from r1sae_fast.triton_kernels.collect import _pass
    from r1sae_fast.triton_kernels.encode_gemm import chunk_buffers
    from r1sae_fast.triton_kernels.encode_topk_large import row_kth_values
    from r1sae_fast.triton_kernels.kth_value import kth_value

    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        yield Case("kth_value", short, partial(kth_value, meta(ROWS * 896, dtype=dtype), ROWS * K))
        # The launcher waits for a count in between; these are its two launches.
        chunk = chunk_buffers(meta(ROWS, D_IN, dtype=dtype), ROWS, D_SAE)
        yield Case("row_kth", short, partial(row_kth_values, chunk, 1024, D_IN // 2))
        counts, offsets = meta(1024, dtype=torch.int32), meta(1025, dtype=torch.int64)
        one, rows, each, groups = (
            meta(n, dtype=torch.float32) for n in (1, 1024, D_SAE, D_SAE // 32)
        )
        values, indices = meta(ROWS * K, dtype=dtype), meta(ROWS * K, dtype=torch.int32)
        kinds = {
            "one bound": (one, None),
            "a bound a row": (rows, None),
            "a bound a feature": (each, groups),
        }
        for name, bounds in kinds.items():
            strict = name == "a bound a feature"
            for out in ((None, None), (values, indices)):
                given = (chunk, 1024, bounds[0], bounds[1], counts, offsets, out[0], out[1])
                call = partial(_pass, *given, strict, name == "a bound a row")
                yield Case(
                    "collect", f"{short}, {name}, {'count' if out[0] is None else 'write'}", call
                )


def _screen_cases() -> Iterator[Case]:
    from r1sae_fast.triton_kernels import int8_screen as screen
    from r1sae_fast.triton_kernels.encode_gemm import Chunk
    from r1sae_fast.triton_kernels.sparse_grad import gradient_of_values

    f32 = torch.float32
    weight, bias = meta(D_SAE, D_IN, dtype=f32), meta(D_SAE, dtype=f32)
    yield Case("int8_screen", "weights", partial(screen.screened_weights, weight, bias))
    groups = D_SAE // screen.GROUP
    upper = Chunk(meta(1024, D_SAE, dtype=f32), meta(1024, groups, dtype=f32), weight, screen.GROUP)
    lower = meta(1024, groups, dtype=f32)
    x = meta(1024, D_IN, dtype=f32)

    def bound() -> None:
        screen.bound_chunk(x, screen.screened_weights(weight, bias), 1, upper, lower)

    cores = {"sm_80": ("IMMA",), "sm_90": ("IGMMA",), "sm_100": ("UTCMMA",), "gfx942": ("MFMA",)}
    yield Case("int8_screen", "bounds", bound, cores, "int8_gemm_kernel")
    yield Case("int8_screen", "bound a row", partial(screen.row_bounds, lower, K))
    _, indices, offsets = codes(f32, 1024, 4 * K)
    exact = partial(gradient_of_values, x, indices, offsets, weight, wide=True)
    yield Case("int8_screen", "exact products", exact, {"all": ("LDG.128",)})


def _tap_cases() -> Iterator[Case]:
    from r1sae_fast.triton_kernels.sae_tap import SaeTap

    vector = {"all": ("LDG.128",)}
    for dtype in (torch.bfloat16, torch.float32):
        weight, x = meta(D_SAE, D_IN, dtype=dtype), meta(1024, D_IN, dtype=dtype)
        for limit in (None, meta(1, dtype=torch.float32)):
            tap = SaeTap(weight.T, None, weight, K, 1024, entries=4, threshold=limit)
            name = str(dtype).removeprefix("torch.") + ("" if limit is None else ", threshold")
            yield Case("sae_tap", name, partial(tap, x), vector, "sae_tap_kernel")


CASES: tuple[Callable[[], Iterator[Case]], ...] = (
    _decode_cases,
    _gradient_cases,
    _fp8_cases,
    _encode_cases,
    _collect_cases,
    _screen_cases,
    _tap_cases,
)
"""One generator a kernel family."""
