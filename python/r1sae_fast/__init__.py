"""Sparse autoencoders at the scale of DeepSeek-R1."""

from importlib.metadata import version as _version

from r1sae_fast.errors import R1SaeError

__version__ = _version("r1sae-fast")
__all__ = ["R1SaeError", "__version__"]
