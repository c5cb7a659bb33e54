"""From a training run to a checkpoint folder in R1's layout."""

from __future__ import annotations

from pathlib import Path

from r1sae_fast.r1.checkpoint import write_checkpoint
from r1sae_fast.tiny_r1 import vocabulary
from r1sae_fast.tiny_r1.recipe import CONFIG, Training


def export(training: Training, directory: Path, *, fp8: bool = True) -> None:
    """Writes config, shards with index, tokenizer and chat template into ``directory``.

    Args:
        training: a run; its float32 master weights are what is quantised.
        directory: made if absent.
        fp8: store the projections in block fp8, as R1's; else in bfloat16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary.write(directory)
    write_checkpoint(directory, CONFIG, training.master_state(), fp8=fp8)
