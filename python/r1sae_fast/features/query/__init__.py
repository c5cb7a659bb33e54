"""Questions about many features at once: an expression language, frames, ranks."""

from r1sae_fast.features.query.expression import Expression
from r1sae_fast.features.query.frame import Frame

__all__ = ["Expression", "Frame"]
