"""All pre-activations above a threshold: the test of JumpReLU (arXiv 2407.14435).

Unlike BatchTopK no row depends on its company, so that codes are the same in every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops import _common
from r1sae_fast.ops._common import RawCodes
from r1sae_fast.ops._register import register

__all__ = ["threshold", "threshold_reference"]


def threshold(
    pre_activations: Tensor, threshold: Tensor | float, *, check_finite: bool = True
) -> SparseCodes:
    """The positive values that exceed ``threshold``.

    Args:
        pre_activations: ``[..., d_sae]``, floating. Gradients flow to what was chosen.
        threshold: a number, or a tensor ``[]`` or ``[d_sae]``; compared in float32 (float64 where
            the values are float64). No gradient flows to it. Below 0 is as good as 0.
        check_finite: refuse NaN and infinities. Without it NaN is never chosen.

    Returns:
        Codes by falling value in each row; ties go to the lower feature.

    Raises:
        TypeError: not a floating tensor.
        ValueError: a threshold of another shape or device.
        NonFiniteError: names the (flat) row.
    """
    flat = _common.flat_rows(pre_activations)
    if not isinstance(threshold, Tensor):
        threshold = torch.tensor(threshold, dtype=torch.float64, device=flat.device)
    if tuple(threshold.shape) not in ((), (1,), (flat.shape[1],)):
        raise ValueError(
            f"threshold has shape {tuple(threshold.shape)}; expected () or ({flat.shape[1]},)"
        )
    if threshold.device != flat.device:
        raise ValueError(f"threshold lies on {threshold.device}, pre_activations on {flat.device}")
    compared = torch.float64 if flat.dtype == torch.float64 else torch.float32
    bounds = threshold.detach().to(compared).reshape(-1)
    return _common.as_codes(_threshold(flat, bounds, check_finite), pre_activations)


def threshold_reference(
    pre_activations: Tensor, threshold: Tensor, check_finite: bool = True
) -> RawCodes:
    """The truth, in plain torch; ``threshold`` is ``[1]`` or ``[d_sae]``."""
    if check_finite:
        _common.require_finite(pre_activations)
    above = (pre_activations > 0) & (pre_activations.to(threshold.dtype) > threshold)
    rows, columns = torch.nonzero(above, as_tuple=True)
    values = pre_activations[rows, columns]
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    return _common.raw_codes(values[order], rows, columns[order], pre_activations.shape[0])


def _cpu(pre_activations: Tensor, threshold: Tensor, check_finite: bool) -> RawCodes:
    if not _common.in_rust(pre_activations):
        return threshold_reference(pre_activations, threshold, check_finite)
    raw = _core.threshold(
        _common.to_rust(pre_activations),
        _common.to_rust(threshold),
        check_finite,
        _common.threads(),
    )
    return _common.raw_from_rust(raw)


_threshold = register(
    "threshold(Tensor pre_activations, Tensor threshold, bool check_finite)"
    " -> (Tensor, Tensor, Tensor)",
    reference=threshold_reference,
    cpu=_cpu,
    fake=_common.fake_selection,
    setup_context=_common.save_selection,
    backward=_common.selection_backward,
)
