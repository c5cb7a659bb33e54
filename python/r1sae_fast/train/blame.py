"""Which rows a step took: for who looks for what made a loss NaN."""

from __future__ import annotations

from r1sae_fast import _core
from r1sae_fast.shards.loader import ShardLoader
from r1sae_fast.train.mixing import MixingLoader

__all__ = ["rows_of"]

_NAMED = 8


def rows_of(loader: ShardLoader | MixingLoader, step: int) -> str:
    """The rows of step ``step`` (from 1) of a run with this loader, in words: numbers in the
    shards, of which a few are told and how to get all; of an engine's, up to which text."""
    if isinstance(loader, MixingLoader):
        return f"rows of {loader.rows.folder}, among its first {loader.texts} texts"
    rows, size = len(loader.shards), loader.batch_size
    epoch, place = divmod(step - 1, rows // size)
    start = place * size
    numbers = _core.permutation(rows, loader.seed, epoch, start, start + size)
    few = ", ".join(map(str, numbers[:_NAMED].tolist()))
    more = ", ..." if size > _NAMED else ""
    return (
        f"rows {few}{more} of {loader.shards.folder} (places {start} to {start + size - 1} in the "
        f"order of epoch {epoch}, seed {loader.seed})"
    )
