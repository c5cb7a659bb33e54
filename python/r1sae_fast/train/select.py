"""Which pre-activations become codes, by the package's own operations."""

from __future__ import annotations

from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes


def select(pre_activations: Tensor, k: int, mode: str) -> SparseCodes:
    """Codes of ``pre_activations [rows, d_sae]`` in ``mode`` "batch_topk" or "topk".

    NaN is never a code: the trainer looks for it in loss and weights instead, less often.
    """
    operation = ops.batch_topk if mode == "batch_topk" else ops.topk
    return operation(pre_activations, k, check_finite=False)
