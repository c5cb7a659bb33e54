"""TinyR1: a small trained reasoning model of R1's architecture and checkpoint layout.

It ships with the package, so that everything runs for real without R1: ``path()`` is a checkpoint
folder like R1's own (config, block-fp8 shards, index, tokenizer, chat template). It solves the
little problems of :mod:`~r1sae_fast.tiny_r1.problems` step by step, checks each step, and writes
"Wait" when the check differs. :mod:`~r1sae_fast.tiny_r1.recipe` made it.
"""

from pathlib import Path

NAME = "tiny-r1"
"""What stands for the shipped model wherever a checkpoint folder is asked for."""


def path() -> Path:
    """The checkpoint folder inside the package.

    Raises:
        FileNotFoundError: the installation lacks the weights.
    """
    folder = Path(__file__).parent / "weights"
    if not (folder / "model.safetensors.index.json").is_file():
        raise FileNotFoundError(
            f"{folder}: TinyR1's weights are missing from this installation; "
            "reinstall r1sae-fast, or make them anew with `r1sae tiny-r1 train`"
        )
    return folder


__all__ = ["NAME", "path"]
