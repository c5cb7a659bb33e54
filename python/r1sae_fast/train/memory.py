"""How much memory a run takes, told before it.

Of ``P`` weights (``d_in * d_sae``, twice that untied) a step in float32 on the CPU holds

    4 P                 weights
    8 P * fired         Adam's two moments, of features that have fired
    d_in * d_sae        the encoder in 8 bits, where codes are found by screening
    8 d_in * dead       encoder and decoder rows of dead features, while they explain what is left
    16 d_in^2           a transcoder's skip connection, its gradient and moments
    batch               rows, their reconstruction and error, codes, products of dead features, a
                        transcoder's targets

and no gradient of encoder and decoder: those are sums over codes that are made row by row in cache.
That is within ``P * (weights 4 + gradients 4 + Adam 8) + batch`` until dead features take the
gradients' share: seven eighths of them, three eighths where the SAE is tied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1sae_fast.ops.choice import most_copy_bytes
from r1sae_fast.train.config import TrainConfig

__all__ = ["ExpectedMemory", "expected_memory"]

_ROW_ARRAYS = 6
"""Of ``[rows, d_in]`` in float32 at once: as read, standardised, reconstructed, less x, squared,
explained by dead features."""
_TARGET_ARRAYS = 2
"""A transcoder's besides: targets as read and standardised."""
_BUFFERS = 4
"""Batches in the loader's memory: two ahead, one in use, one about to be dropped."""
_CODE_BYTES = 64
"""A code: value, feature, place among its feature's, both gradients' coefficients."""
_DEAD_ARRAYS = 4
"""Of ``[rows, dead]`` in float32: pre-activations, codes, their gradient, a product."""
_BLOCKS = 3 << 26
"""Blocks of 64 MiB in which products of dead features are added up, at most."""


@dataclass(frozen=True)
class ExpectedMemory:
    """Bytes at most, beside the program's own (some 0.4 GB with torch)."""

    parameters: int
    """Numbers of both matrices."""
    weights: int
    moments: int
    """Adam's."""
    copies: int
    """Weights in fewer bits, which codes are found with."""
    dead: int
    """Copies of dead features."""
    batch: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.moments + self.copies + self.dead + self.batch

    def __str__(self) -> str:
        parts = ("weights", "moments", "copies", "dead", "batch")
        told = ", ".join(f"{part} {getattr(self, part) / 1e9:.2f}" for part in parts)
        return f"at most {self.total / 1e9:.2f} GB beside the program's own ({told})"


def expected_memory(
    config: TrainConfig,
    d_in: int,
    *,
    fired: float = 1.0,
    dead: float = 0.0,
    stored_bytes: int = 4,
    transcodes: bool = False,
) -> ExpectedMemory:
    """The memory of a run on the CPU, in one process.

    Args:
        config: of the run.
        d_in: numbers of a row.
        fired: share of the features that ever have a code; moments of others take no memory.
        dead: share that is dead at once, at most.
        stored_bytes: of a number in the shards.
        transcodes: whether rows have targets.
    """
    one, n = d_in * config.d_sae, config.batch_size
    parameters = one if config.tied else 2 * one
    rounded = config.compute_dtype == "bfloat16"
    screened = most_copy_bytes(d_in, torch.bfloat16 if rounded else torch.float32)
    copies = (2 * parameters if rounded else 0) + screened * (one + 128 * config.d_sae)
    dead_features = int(dead * config.d_sae)
    codes = n * (config.first_l0 if config.aims_at_k else config.d_sae // 2)
    batch = n * d_in * (4 * _ROW_ARRAYS + stored_bytes * _BUFFERS) + _CODE_BYTES * codes
    if transcodes:
        batch += n * d_in * (4 * _TARGET_ARRAYS + stored_bytes * _BUFFERS)
    skip = d_in * d_in if config.skip_connection else 0
    batch += 4 * skip  # its gradient
    if not screened or config.penalised:
        batch += 2 * 4 * n * config.d_sae  # all pre-activations
    if dead_features:
        batch += 4 * _DEAD_ARRAYS * n * dead_features + min(_BLOCKS, 12 * one)
    return ExpectedMemory(
        parameters,
        weights=4 * (parameters + skip),
        moments=int(8 * parameters * fired) + 8 * skip,
        copies=copies,
        dead=8 * d_in * dead_features,
        batch=batch,
    )
