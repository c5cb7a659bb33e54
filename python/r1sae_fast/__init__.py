"""Sparse autoencoders at the scale of DeepSeek-R1.

The public names load on first use, so that ``import r1sae_fast`` stays quick and does not
import torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from r1sae_fast import _core
from r1sae_fast.errors import R1SaeError

if TYPE_CHECKING:
    # The same names as in _LAZY, for type checkers and editors.
    from r1sae_fast.checkpoints import load_logic_sae, load_math_sae
    from r1sae_fast.codes import SparseCodes
    from r1sae_fast.sae import FastSAE

__version__ = _core.__version__
__all__ = [
    "FastSAE",
    "R1SaeError",
    "SparseCodes",
    "__version__",
    "load_logic_sae",
    "load_math_sae",
]

_LAZY: dict[str, str] = {
    # public name: module that defines it
    "FastSAE": "r1sae_fast.sae",
    "SparseCodes": "r1sae_fast.codes",
    "load_logic_sae": "r1sae_fast.checkpoints",
    "load_math_sae": "r1sae_fast.checkpoints",
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


if _core.DEBUG_BUILD:
    import warnings as _warnings

    _warnings.warn(
        "r1sae_fast._core is a debug build, ten times slower or more; "
        "rebuild it with `make` or `maturin develop --release`",
        RuntimeWarning,
        stacklevel=2,
    )
