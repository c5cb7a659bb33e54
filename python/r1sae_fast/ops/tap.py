"""A tap in a running model as one operation that writes into given buffers.

What :class:`r1sae_fast.triton_kernels.sae_tap.SaeTap` calls on a GPU, so that ``torch.compile``
sees one node. No gradient flows through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1sae_fast.ops import _common
from r1sae_fast.ops._register import register

__all__ = ["tap", "tap_reference"]

SET = 0
"""The kind of entry whose strength becomes the feature's; others are added to it."""


def tap_reference(
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
    """The truth, in plain torch; the last five are the kernels' room and stay as they are.

    Args:
        residual: ``[n, d_in]``.
        W_enc, b_enc, W_dec: ``[d_in, d_sae]``, ``[d_sae]``, ``[d_sae, d_in]``.
        threshold: float32 ``[1]``, which codes must exceed.
        active: uint8, at least ``[n]``: rows that take part.
        features, strengths, kinds: int32, float32, int8, at least ``[n, entries]``; feature -1,
            or one that isn't there, is no entry (buffers are not read on the host).
        k: codes a row.
        steer: write ``output``.
        values, indices, counts: ``[n, k]``, int32 ``[n, k]``, int32 ``[n]``: written.
        output: at least ``[n, d_in]``: its first n rows are written.
    """
    count = residual.shape[0]
    pre = residual @ W_enc
    positive = _common.positive_part(pre if b_enc is None else pre + b_enc)
    found, places = positive.sort(dim=-1, descending=True, stable=True)
    found, places = found[:, :k], places[:, :k].to(torch.int32)
    kept = found > 0
    if threshold is not None:
        kept &= found.float() > threshold
    own = torch.where(kept, found.float(), 0.0)
    on = active[:count] != 0
    if steer:
        total = residual.float()
        for entry in range(features.shape[1]):
            feature, strength = features[:count, entry], strengths[:count, entry]
            present = torch.where(places == feature[:, None], own, 0.0).sum(1)
            change = torch.where(kinds[:count, entry] == SET, strength - present, strength)
            change = torch.where(on & (feature >= 0) & (feature < len(W_dec)), change, 0.0)
            row = feature.clamp(0, len(W_dec) - 1).long()
            total = total + change[:, None] * W_dec[row].float()
        steered = torch.where(on[:, None], total.to(residual.dtype), residual)
        output[:count] = steered
    kept &= on[:, None]
    values.copy_(torch.where(kept, found, 0))
    indices.copy_(torch.where(kept, places, 0))
    counts.copy_(kept.sum(1))


def _fake(*_: Any) -> None:
    return None


tap = register(
    "sae_tap(Tensor residual, Tensor W_enc, Tensor? b_enc, Tensor W_dec, Tensor? threshold,"
    " Tensor active, Tensor features, Tensor strengths, Tensor kinds, int k, bool steer,"
    " Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts, Tensor(d!) output,"
    " Tensor(e!) scratch, Tensor(f!) maxima, Tensor(g!) keys, Tensor(h!) bad_row, int group) -> ()",
    reference=tap_reference,
    cpu=tap_reference,
    fake=_fake,
)
