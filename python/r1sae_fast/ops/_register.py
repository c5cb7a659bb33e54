"""How an operation becomes ``torch.ops.r1sae_fast.NAME``.

``torch.library.custom_op`` would be shorter, but its first call imports all of torch's compiler
(seconds); the plain ``Library`` doesn't.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register"]

# Any, because torch's class has no types.
_Library: Any = torch.library.Library
_LIBRARY = _Library("r1sae_fast", "DEF")


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines an operation and returns it.

    Args:
        schema: its name and signature in torch's language.
        reference: runs on every device.
        cpu: runs on the CPU instead.
        fake: shapes and dtypes alone, for ``torch.compile`` and ``torch.export``.
        setup_context, backward: its gradient, as for ``torch.library.register_autograd``; none for
            an operation that writes to its arguments.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    for function, key in ((reference, "CompositeExplicitAutograd"), (cpu, "CPU")):
        _LIBRARY.impl(name, function, key)
    qualified = f"r1sae_fast::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_LIBRARY
        )
    operation: Callable[..., Any] = getattr(torch.ops.r1sae_fast, name)
    return operation
