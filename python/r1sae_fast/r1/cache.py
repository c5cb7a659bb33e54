"""The latent KV cache: what a token leaves behind for later ones to attend to.

Per token and layer one row of ``kv_lora_rank + qk_rope_head_dim`` numbers (576 in R1): the
normalised latent that all heads' keys and values are expanded from, and the shared rotary key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.rope import rotary_table

_GROWTH = 128
# Steps look at a multiple of so many slots: on CPUs, torch compiles its bf16 products anew for
# every length.
_WINDOW = 64


class NewSlots:
    """Where new tokens go in a cache, and what they may see.

    Attributes:
        positions: int64 [batch, new], slots of the tokens; each sees those up to its own.
        window: slots that are looked at.
    """

    def __init__(self, positions: Tensor, window: int) -> None:
        self.positions, self.window = positions, window
        self._bias: Tensor | None = None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """[batch, new, 1, window] for scores: 0, or -inf where a slot is hidden. Made once."""
        if self._bias is None or self._bias.dtype != dtype:
            positions = self.positions
            hidden = torch.arange(self.window, device=positions.device) > positions[..., None]
            bias = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
            self._bias = bias.masked_fill_(hidden, -torch.inf)[:, :, None]
        return self._bias

    def write(self, cache: Tensor, rows: Tensor) -> None:
        """Puts ``rows`` [batch, new, width] into one layer's cache [batch, capacity, width]."""
        batch, new = self.positions.shape
        sequences = torch.arange(batch, device=cache.device)[:, None].expand(-1, new)
        cache[sequences, self.positions] = rows


class LatentCache:
    """Rows of a batch of sequences of unequal lengths; each starts at slot 0.

    Attributes:
        rows: [layers, batch, capacity, kv_lora_rank + qk_rope_head_dim].
        lengths: int64 [batch], the filled slots of each sequence, equal in all layers.
        longest: the largest of them, kept here so that a step need not ask the device.
        rotary: of the positions of at least ``capacity`` slots, see :func:`rotary_table`.
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
        self.longest = int(lengths.max()) if batch else 0
        self._config = config
        self.rotary = self._rotary()

    @property
    def capacity(self) -> int:
        """Slots of each sequence."""
        return self.rows.shape[2]

    def _rotary(self) -> Tensor:
        return rotary_table(self._config, torch.arange(self.capacity, device=self.rows.device))

    @property
    def window(self) -> int:
        """Slots that a step looks at: at least those of the longest sequence."""
        return min(-(-self.longest // _WINDOW) * _WINDOW, self.capacity)

    def reserve(self, capacity: int) -> None:
        """Makes room for ``capacity`` slots a sequence."""
        if capacity > self.capacity:
            more = max(capacity - self.capacity, self.capacity // 2, _GROWTH)
            self.rows = torch.nn.functional.pad(self.rows, (0, 0, 0, more))
            if self.rotary.shape[0] < self.capacity:
                self.rotary = self._rotary()

    def grow(self, new: int) -> NewSlots:
        """Counts ``new`` more tokens of each sequence, for which there is room then."""
        self.longest += new
        self.reserve(self.longest)
        slots = self.lengths[:, None] + torch.arange(new, device=self.lengths.device)
        self.lengths = self.lengths + new
        return NewSlots(slots, self.window)

    def keep(self, sequences: Tensor) -> None:
        """Drops all sequences but these (int64 positions in the batch)."""
        self.lengths = self.lengths[sequences]
        self.longest = int(self.lengths.max()) if len(sequences) else 0
        self.rows = self.rows[:, :, : self.longest + _WINDOW].index_select(1, sequences)
