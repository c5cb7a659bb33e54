"""FastSAE and its configuration."""

from r1sae_fast.sae.config import MODES, Mode, SaeConfig
from r1sae_fast.sae.fast_sae import FastSAE

__all__ = ["MODES", "FastSAE", "Mode", "SaeConfig"]
