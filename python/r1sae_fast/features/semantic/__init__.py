"""Search by meaning: labels as vectors of a local sentence-embedding model (extra ``search``)."""

from r1sae_fast.features.semantic.model import TextEncoder

__all__ = ["TextEncoder"]
