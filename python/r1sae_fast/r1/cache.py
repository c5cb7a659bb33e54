"""The latent KV cache: what a token leaves behind for later ones to attend to.

Per token and layer one row of ``kv_lora_rank + qk_rope_head_dim`` numbers (576 in R1): the
normalised latent that all heads' keys and values are expanded from, and the shared rotary key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.r1.config import R1Config

_GROWTH = 128


class LatentCache:
    """Rows of a batch of sequences of unequal lengths; each starts at slot 0.

    Attributes:
        rows: [layers, batch, capacity, kv_lora_rank + qk_rope_head_dim].
        lengths: int64 [batch], the filled slots of each sequence, equal in all layers.
    """

    def __init__(
        self,
        config: R1Config,
        lengths: Tensor,
        *,
        layers: int,
        capacity: int,
        dtype: torch.dtype,
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        batch = lengths.shape[0]
        self.rows = torch.zeros(layers, batch, capacity, width, dtype=dtype, device=lengths.device)
        self.lengths = lengths.clone()

    @property
    def capacity(self) -> int:
        """Slots of each sequence."""
        return self.rows.shape[2]

    def reserve(self, capacity: int) -> None:
        """Makes room for ``capacity`` slots a sequence."""
        if capacity > self.capacity:
            more = max(capacity - self.capacity, self.capacity // 2, _GROWTH)
            self.rows = torch.nn.functional.pad(self.rows, (0, 0, 0, more))

    def keep(self, sequences: Tensor) -> None:
        """Drops all sequences but these (int64 positions in the batch)."""
        self.lengths = self.lengths[sequences]
        longest = int(self.lengths.max()) + 1 if len(sequences) else 0
        self.rows = self.rows[:, :, :longest].index_select(1, sequences)
