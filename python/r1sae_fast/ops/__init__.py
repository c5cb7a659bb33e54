"""The operations of a sparse autoencoder, one a file.

Each has a reference in plain torch (``*_reference``, the truth), a Rust path that is taken on the
CPU for float32 and bfloat16, a gradient, and is a ``torch.library`` custom operation
(``torch.ops.r1sae_fast.*``), so that ``torch.compile`` and ``torch.export`` see it whole.
"""

from r1sae_fast.ops import _cuda as _cuda
from r1sae_fast.ops._simd import set_simd, simd_info
from r1sae_fast.ops.batch_topk import batch_topk, batch_topk_reference
from r1sae_fast.ops.code_gradients import code_gradients, sums_by_feature
from r1sae_fast.ops.code_values import with_gradient
from r1sae_fast.ops.decode import decode, decode_reference
from r1sae_fast.ops.decoder_copy import DecoderCopy
from r1sae_fast.ops.encode import encode_batch_topk, encode_threshold, encode_topk
from r1sae_fast.ops.row_changes import RowChanges
from r1sae_fast.ops.screen import (
    SCREEN_KINDS,
    Screen,
    ScreenKind,
    ScreenReport,
    best_screen,
)
from r1sae_fast.ops.sparse_grad import decode_in_factors, encode_in_factors
from r1sae_fast.ops.threshold import threshold, threshold_reference
from r1sae_fast.ops.topk import topk, topk_reference

__all__ = [
    "SCREEN_KINDS",
    "DecoderCopy",
    "RowChanges",
    "Screen",
    "ScreenKind",
    "ScreenReport",
    "batch_topk",
    "batch_topk_reference",
    "best_screen",
    "code_gradients",
    "decode",
    "decode_in_factors",
    "decode_reference",
    "encode_batch_topk",
    "encode_in_factors",
    "encode_threshold",
    "encode_topk",
    "set_simd",
    "simd_info",
    "sums_by_feature",
    "threshold",
    "threshold_reference",
    "topk",
    "topk_reference",
    "with_gradient",
]
