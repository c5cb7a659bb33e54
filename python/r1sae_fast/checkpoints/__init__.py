"""SAEs on disk, one format a file: Goodfire's release and our own."""

from r1sae_fast.checkpoints.goodfire import load_goodfire_sae, load_logic_sae, load_math_sae

__all__ = ["load_goodfire_sae", "load_logic_sae", "load_math_sae"]
