"""An SAE inside a running model: residual in, codes and a steered residual out.

Everything is preallocated, launches depend on shapes alone and nothing waits for the GPU, so the
call can stand in a hook and be captured in a CUDA graph (after a call outside of one, which
compiles the kernels). Which rows take part and what is steered are read from tensors that the
caller may fill anew before each replay.

Steering keeps the SAE's error: a feature's decoder direction is added as often as its strength is
to change (AxBench's clamp, arXiv:2501.17148), so a feature set to what it is changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1sae_fast.ops.tap import tap
from r1sae_fast.triton_kernels.configs import config
from r1sae_fast.triton_kernels.encode_gemm import CHUNK, Chunk, chunk_buffers
from r1sae_fast.triton_kernels.encode_topk import (
    PaddedCodes,
    encode_topk,
    encode_topk_traffic,
    group_for,
)
from r1sae_fast.triton_kernels.launch import launch
from r1sae_fast.triton_kernels.traffic import Traffic

__all__ = ["ADD", "SET", "SaeTap", "run_tap", "sae_tap_traffic"]

SET, ADD = 0, 1
"""What an entry does with its strength: make it the feature's, or add it to the feature's."""


@triton.jit
def sae_tap_kernel(
    residual,
    values,
    indices,
    counts,
    threshold,
    active,
    features,
    strengths,
    kinds,
    W_dec,
    output,
    d_in,
    k,
    entries,
    d_sae,
    HAS_THRESHOLD: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d_in
    steered = tl.load(residual + row * d_in + columns, mask=inside, other=0.0)
    on = tl.load(active + row).to(tl.int32) != 0
    place = tl.arange(0, K)
    own = tl.load(values + row * k + place, mask=place < k, other=0.0).to(tl.float32)
    kept = own > 0.0
    if HAS_THRESHOLD:
        kept = kept & (own > tl.load(threshold))
    own = tl.where(kept, own, 0.0)
    if on:
        feature_of = tl.load(indices + row * k + place, mask=place < k, other=-1)
        total = steered.to(tl.float32)
        for entry in range(0, entries):
            feature = tl.load(features + row * entries + entry)
            if (feature >= 0) & (feature < d_sae):
                change = tl.load(strengths + row * entries + entry)
                kind = tl.load(kinds + row * entries + entry).to(tl.int32)
                # A SET takes what the SAE sees now away, an ADD leaves it.
                present = tl.sum(tl.where(feature_of == feature, own, 0.0), axis=0)
                change = tl.where(kind == 0, change - present, change)
                direction = tl.load(
                    W_dec + feature.to(tl.int64) * d_in + columns, mask=inside, other=0.0
                )
                total += change * direction.to(tl.float32)
        steered = total.to(output.dtype.element_ty)
    tl.store(output + row * d_in + columns, steered, mask=inside)


@triton.jit
def trim_kernel(
    values,
    indices,
    counts,
    threshold,
    active,
    k,
    HAS_THRESHOLD: tl.constexpr,
    K: tl.constexpr,
):
    """Drops the codes of rows that are off, and those that do not exceed the threshold."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    value = tl.load(values + row * k + place, mask=place < k, other=0.0)
    own = value.to(tl.float32)
    kept = (own > 0.0) & (tl.load(active + row).to(tl.int32) != 0)
    if HAS_THRESHOLD:
        kept = kept & (own > tl.load(threshold))
    dropped = (place < k) & (kept == 0)
    nothing = tl.zeros([K], tl.float32)
    tl.store(values + row * k + place, nothing.to(values.dtype.element_ty), mask=dropped)
    tl.store(indices + row * k + place, tl.zeros([K], tl.int32), mask=dropped)
    tl.store(counts + row, tl.sum(kept.to(tl.int32), axis=0))


def run_tap(
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    active: Tensor,
    features: Tensor,
    strengths: Tensor,
    kinds: Tensor,
    k: int,
    steer: bool,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    output: Tensor,
    scratch: Tensor,
    maxima: Tensor,
    keys: Tensor,
    bad_row: Tensor,
    group: int,
) -> None:
    """The launches of a tap; arguments as for :func:`r1sae_fast.ops.tap.tap_reference`."""
    count, d_in = residual.shape
    codes = PaddedCodes(values, indices, counts, bad_row)
    chunk = Chunk(scratch, maxima, bad_row, group)
    encode_topk(residual, W_enc, b_enc, k, out=codes, chunk=chunk, keys=keys)
    limit = counts if threshold is None else threshold
    padded_k = triton.next_power_of_2(max(k, 1))
    if steer:
        settings = config("sae_tap", residual.device)
        launch(
            sae_tap_kernel,
            (count, triton.cdiv(d_in, settings.blocks["BLOCK_D"])),
            residual,
            values,
            indices,
            counts,
            limit,
            active,
            features,
            strengths,
            kinds,
            W_dec,
            output,
            d_in,
            k,
            features.shape[1],
            W_dec.shape[0],
            HAS_THRESHOLD=threshold is not None,
            K=padded_k,
            **settings.options,
        )
    launch(
        trim_kernel,
        (count,),
        values,
        indices,
        counts,
        limit,
        active,
        k,
        HAS_THRESHOLD=threshold is not None,
        K=padded_k,
        num_warps=1,
    )


class SaeTap:
    """Buffers and launches for one SAE and up to ``rows`` rows at a time.

    Args:
        W_enc: ``[d_in, d_sae]``, strided either way.
        b_enc: ``[d_sae]`` or None.
        W_dec: ``[d_sae, d_in]``, contiguous.
        k: most codes a row, at most 512.
        rows: most rows of a call.
        entries: steering entries a row.
        threshold: float32 ``[1]``: codes must exceed it too (a calibrated batch top-k SAE, with k
            well above its L0); default none.

    Attributes:
        codes: of the last call, in the first of its rows.
        output: ``[rows, d_in]``, the steered residual.
        active: uint8 ``[rows]``, 1 where a row takes part (at first: all). Others keep their
            residual to the bit and have no codes.
        features, strengths, kinds: int32, float32, int8 ``[rows, entries]``; feature -1 (at first:
            all) is no entry. :data:`SET` or :data:`ADD`.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor | None,
        W_dec: Tensor,
        k: int,
        rows: int,
        *,
        entries: int = 0,
        threshold: Tensor | None = None,
    ) -> None:
        d_in, d_sae = W_enc.shape
        if tuple(W_dec.shape) != (d_sae, d_in) or not W_dec.is_contiguous():
            raise ValueError(
                f"W_dec has shape {tuple(W_dec.shape)}; expected ({d_sae}, {d_in}), contiguous"
            )
        self.W_enc, self.b_enc, self.W_dec, self.k = W_enc, b_enc, W_dec, k
        self.threshold = threshold
        self.chunk = chunk_buffers(W_dec, rows, d_sae, group_for(k))
        self.keys = W_dec.new_empty(min(rows, CHUNK), k, dtype=torch.int64)
        self.codes = PaddedCodes(
            W_dec.new_empty(rows, k),
            W_dec.new_empty(rows, k, dtype=torch.int32),
            W_dec.new_empty(rows, dtype=torch.int32),
            self.chunk.bad_row,
        )
        self.output = W_dec.new_empty(rows, d_in)
        self.active = W_dec.new_ones(rows, dtype=torch.uint8)
        self.features = W_dec.new_full((rows, entries), -1, dtype=torch.int32)
        self.strengths = W_dec.new_zeros(rows, entries, dtype=torch.float32)
        self.kinds = W_dec.new_zeros(rows, entries, dtype=torch.int8)

    def __call__(self, residual: Tensor, *, steer: bool = True) -> PaddedCodes:
        """Encodes ``residual [n, d_in]`` (contiguous, n at most ``rows``) into :attr:`codes` and,
        with ``steer``, writes :attr:`output`.

        Steering reads the codes of the residual as given; several entries of one row add up.

        Raises:
            ValueError: a residual of another shape, dtype or device, or one that is not contiguous.
        """
        count, d_in = residual.shape
        if count > self.output.shape[0] or d_in != self.output.shape[1]:
            raise ValueError(
                f"the residual has shape {tuple(residual.shape)}; expected at most "
                f"{self.output.shape[0]} rows of {self.output.shape[1]}"
            )
        wanted = (self.W_dec.dtype, self.W_dec.device)
        if (residual.dtype, residual.device) != wanted:
            raise ValueError(
                f"the residual is {residual.dtype} on {residual.device}; expected "
                f"{wanted[0]} on {wanted[1]}"
            )
        if not residual.is_contiguous():
            raise ValueError("the residual is not contiguous; a copy would take memory: make one")
        codes = PaddedCodes(
            self.codes.values[:count],
            self.codes.indices[:count],
            self.codes.counts[:count],
            self.codes.bad_row,
        )
        run = tap if residual.device.type == "cuda" else run_tap
        run(
            residual,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.threshold,
            self.active,
            self.features,
            self.strengths,
            self.kinds,
            self.k,
            steer,
            codes.values,
            codes.indices,
            codes.counts,
            self.output,
            self.chunk.scratch,
            self.chunk.maxima,
            self.keys,
            codes.bad_row,
            self.chunk.group,
        )
        return codes


def sae_tap_traffic(
    rows: int, d_in: int, d_sae: int, k: int, entries: int = 0, *, itemsize: int = 2
) -> Traffic:
    """Of one call of :class:`SaeTap`: encoding, then the residual once in and once out."""
    steering = Traffic(
        hbm_read=rows * (d_in * (1 + entries) * itemsize + k * (itemsize + 4)),
        hbm_written=rows * (d_in * itemsize + k * (itemsize + 4)),
        l2_read=rows * d_in * (1 + entries) * itemsize,
        flops=2.0 * rows * entries * d_in,
    )
    return encode_topk_traffic(rows, d_in, d_sae, k, itemsize=itemsize) + steering
