"""The k largest positive pre-activations of each row (TopK: Gao et al., arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops import _common
from r1sae_fast.ops._common import RawCodes
from r1sae_fast.ops._register import register

__all__ = ["topk", "topk_reference"]


def topk(pre_activations: Tensor, k: int, *, check_finite: bool = True) -> SparseCodes:
    """The ``k`` largest positive values of each row; fewer where fewer are positive.

    Args:
        pre_activations: ``[..., d_sae]``, floating. Gradients flow to what was chosen.
        k: 0 to d_sae.
        check_finite: refuse NaN and infinities. Without it NaN is never chosen.

    Returns:
        Codes by falling value in each row; ties go to the lower feature.

    Raises:
        TypeError: not a floating tensor, or k not an int.
        ValueError: k out of range.
        NonFiniteError: names the (flat) row.
    """
    flat = _common.flat_rows(pre_activations, k)
    return _common.as_codes(_topk(flat, k, check_finite), pre_activations)


def topk_reference(pre_activations: Tensor, k: int, check_finite: bool = True) -> RawCodes:
    """The truth, in plain torch: a stable sort of ``[rows, d_sae]``."""
    if check_finite:
        _common.require_finite(pre_activations)
    positive = _common.positive_part(pre_activations)
    values, columns = positive.sort(dim=-1, descending=True, stable=True)
    values, columns = values[:, :k], columns[:, :k]
    rows, places = torch.nonzero(values, as_tuple=True)
    return _common.raw_codes(
        values[rows, places], rows, columns[rows, places], pre_activations.shape[0]
    )


def _cpu(pre_activations: Tensor, k: int, check_finite: bool) -> RawCodes:
    if not _common.in_rust(pre_activations):
        return topk_reference(pre_activations, k, check_finite)
    threads = _common.threads(pre_activations.numel())
    raw = _core.topk(_common.to_rust(pre_activations), k, check_finite, threads)
    return _common.raw_from_rust(raw)


_topk = register(
    "topk(Tensor pre_activations, int k, bool check_finite) -> (Tensor, Tensor, Tensor)",
    reference=topk_reference,
    cpu=_cpu,
    fake=_common.fake_selection,
    setup_context=_common.save_selection,
    backward=_common.selection_backward,
)
