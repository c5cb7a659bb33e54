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
    from r1sae_fast.codes import SparseCodes

__version__ = _core.__version__
__all__ = ["R1SaeError", "SparseCodes", "__version__"]

_LAZY: dict[str, str] = {
    # public name: module that defines it
    "SparseCodes": "r1sae_fast.codes",
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
