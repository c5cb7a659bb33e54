"""The k * rows largest positive pre-activations of all rows together.

BatchTopK (Bussmann et al., arXiv 2412.06410), over all leading positions as in Goodfire's release:
a row gets more codes or fewer than k, and other codes in other company.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops import _common
from r1sae_fast.ops._common import RawCodes
from r1sae_fast.ops._register import register

__all__ = ["batch_topk", "batch_topk_reference"]


def batch_topk(pre_activations: Tensor, k: int, *, check_finite: bool = True) -> SparseCodes:
    """The ``k * rows`` largest positive values of all rows; fewer where fewer are positive.

    Args:
        pre_activations: ``[..., d_sae]``, floating. Gradients flow to what was chosen.
        k: 0 to d_sae; the mean number of codes a row.
        check_finite: refuse NaN and infinities. Without it NaN is never chosen.

    Returns:
        Codes by falling value in each row; ties go to the lower flat index, so to the lower row.

    Raises:
        TypeError: not a floating tensor, or k not an int.
        ValueError: k out of range.
        NonFiniteError: names the (flat) row.
    """
    flat = _common.flat_rows(pre_activations, k)
    return _common.as_codes(_batch_topk(flat, k, check_finite), pre_activations)


def batch_topk_reference(pre_activations: Tensor, k: int, check_finite: bool = True) -> RawCodes:
    """The truth, in plain torch: a stable sort of all of ``[rows, d_sae]``."""
    if check_finite:
        _common.require_finite(pre_activations)
    row_count, d_sae = pre_activations.shape
    positive = _common.positive_part(pre_activations).reshape(-1)
    values, flat = positive.sort(descending=True, stable=True)
    values, flat = values[: k * row_count], flat[: k * row_count]
    values, flat = values[values > 0], flat[values > 0]
    # Stable, so that each row keeps the order by falling value.
    rows, order = torch.div(flat, max(d_sae, 1), rounding_mode="floor").sort(stable=True)
    return _common.raw_codes(values[order], rows, flat[order] % max(d_sae, 1), row_count)


def _cpu(pre_activations: Tensor, k: int, check_finite: bool) -> RawCodes:
    if not _common.in_rust(pre_activations):
        return batch_topk_reference(pre_activations, k, check_finite)
    threads = _common.threads(pre_activations.numel())
    raw = _core.batch_topk(_common.to_rust(pre_activations), k, check_finite, threads)
    return _common.raw_from_rust(raw)


_batch_topk = register(
    "batch_topk(Tensor pre_activations, int k, bool check_finite) -> (Tensor, Tensor, Tensor)",
    reference=batch_topk_reference,
    cpu=_cpu,
    fake=_common.fake_selection,
    setup_context=_common.save_selection,
    backward=_common.selection_backward,
)
