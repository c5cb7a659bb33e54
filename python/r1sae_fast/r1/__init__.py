"""DeepSeek-R1's forward and what is around it: checkpoint, tokenizer, generation, residuals.

The public names load on first use, so that importing a part does not import torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1sae_fast.r1.chat import Tokenizer
    from r1sae_fast.r1.checkpoint import load_model, write_checkpoint
    from r1sae_fast.r1.config import R1Config
    from r1sae_fast.r1.engines.base import Engine
    from r1sae_fast.r1.engines.generating import StreamedToken
    from r1sae_fast.r1.engines.hf import HfEngine
    from r1sae_fast.r1.engines.local import LocalEngine
    from r1sae_fast.r1.generate import Generation, GenerationInterrupted
    from r1sae_fast.r1.model import R1Model
    from r1sae_fast.r1.segments import Segment

__all__ = [
    "Engine",
    "Generation",
    "GenerationInterrupted",
    "HfEngine",
    "LocalEngine",
    "R1Config",
    "R1Model",
    "Segment",
    "StreamedToken",
    "Tokenizer",
    "load_model",
    "write_checkpoint",
]

_LAZY = {
    "Generation": "r1sae_fast.r1.generate",
    "Engine": "r1sae_fast.r1.engines.base",
    "GenerationInterrupted": "r1sae_fast.r1.generate",
    "HfEngine": "r1sae_fast.r1.engines.hf",
    "StreamedToken": "r1sae_fast.r1.engines.generating",
    "LocalEngine": "r1sae_fast.r1.engines.local",
    "R1Config": "r1sae_fast.r1.config",
    "R1Model": "r1sae_fast.r1.model",
    "Segment": "r1sae_fast.r1.segments",
    "Tokenizer": "r1sae_fast.r1.chat",
    "load_model": "r1sae_fast.r1.checkpoint",
    "write_checkpoint": "r1sae_fast.r1.checkpoint",
}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
