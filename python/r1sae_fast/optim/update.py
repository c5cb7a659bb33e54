"""One step of Adam on one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.ops._common import threads, to_rust
from r1sae_fast.ops._memory import zeros_on_demand
from r1sae_fast.ops.row_changes import RowChanges
from r1sae_fast.ops.screen import Follower
from r1sae_fast.optim.factored import (
    FactoredGradient,
    RustSource,
    as_rows,
    factored_gradient,
    feature_major,
    turning,
)

__all__ = ["Settings", "Untouched", "update"]

Untouched = Literal["decay", "freeze"]

_SETTLED_ROWS = 1024


@dataclass(frozen=True)
class Settings:
    """See :class:`r1sae_fast.optim.Adam`."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    untouched: Untouched = "decay"
    unit_rows: bool = False


def update(
    parameter: Tensor,
    state: dict[str, Tensor],
    settings: Settings,
    follower: Follower | None = None,
) -> None:
    """Moves ``parameter`` against its gradients, dense and factored; one of them must be there.

    Args:
        state: empty before the first step.
        follower: a screen of ``parameter``, which rounds rows while they are in cache, where it
            can: it tells whether it did.

    Raises:
        ValueError: a factored gradient for a parameter that Rust can't take.
    """
    factored = factored_gradient(parameter)
    if not state:
        state["step"] = torch.zeros(())
        for name in ("exp_avg", "exp_avg_sq"):
            # Features that never fire take no memory.
            state[name] = zeros_on_demand(parameter.detach())
    state["step"] += 1
    arrays = []
    for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
        array = _rows(tensor)
        if array is None:
            break
        arrays.append(array)
    else:
        combined = FactoredGradient(*arrays[0].shape)
        if factored is not None:
            combined.extend(factored)
        if parameter.grad is not None:
            combined.add_dense(as_rows(parameter.grad, parameter))
        changes, version = getattr(parameter, "row_changes", None), parameter._version
        asleep = state.get("asleep")
        slept = None if asleep is None else asleep > 0
        wake = _fused_step(settings, state, arrays, combined, follower)
        # Torch didn't see it, and who keeps a copy of the weights asks torch.
        torch.autograd.graph.increment_version(parameter)
        if isinstance(changes, RowChanges):
            moved: Tensor | None = None
            if settings.untouched == "freeze":
                moved = combined.touched()
            elif slept is not None and not wake:
                # A row that fell asleep now may have been brought back to norm 1.
                moved = ~(slept & (state["asleep"] > 0))
            changes.note(version, parameter._version, moved)
        return
    if factored is not None:
        raise ValueError(
            f"a factored gradient for a parameter of {parameter.dtype} on {parameter.device} "
            f"with strides {parameter.stride()}; expected float32 on the CPU, [d_sae, d_in] "
            "contiguous or its transpose"
        )
    _plain_step(settings, state, parameter)


def _fused_step(
    settings: Settings,
    state: dict[str, Tensor],
    arrays: list[NDArray[np.float32]],
    factored: FactoredGradient,
    follower: Follower | None,
) -> bool:
    """The step in Rust, in place. Returns whether rows that slept may have moved."""
    w, m, v = arrays
    if factored.products:
        follower = None  # for all rows at once only
    # Which rows rest (see the Rust core), and the least learning rate since one fell asleep.
    asleep = state.get("asleep")
    if asleep is None or asleep.dtype != torch.int64:
        # Loading a state dict makes every tensor of the parameter's dtype.
        none = torch.zeros(factored.d_sae, dtype=torch.int64)
        asleep = state["asleep"] = none if asleep is None else asleep.to(torch.int64)
        state.setdefault("least_rate", torch.zeros(()))
    rate, least = settings.lr, float(state["least_rate"])
    wake = rate > 2.0 * least
    state["least_rate"] = torch.tensor(rate if wake else min(rate, least))

    def update(sources: list[RustSource], features: Tensor | None) -> None:
        beta1, beta2 = settings.betas
        _core.adam_update(
            w,
            m,
            v,
            asleep.numpy(),
            sources,
            None if features is None else features.numpy(),
            number=int(state["step"]),
            learning_rate=rate,
            beta1=beta1,
            beta2=beta2,
            eps=settings.eps,
            scale=1.0,
            unit_rows=settings.unit_rows,
            freeze_idle=settings.untouched == "freeze",
            wake=wake,
            threads=threads(w.size),
            screen=None if follower is None else follower.core,
            bias=None if follower is None else to_rust(follower.bias),
        )

    in_products = factored.in_products()
    update(
        factored.rust_sources(), (~in_products).nonzero().flatten() if factored.products else None
    )
    for features, block in factored.product_rows():
        part = FactoredGradient(factored.d_sae, factored.d_in)
        part.add_rows(features, block)
        update(part.rust_sources(), features)
    if follower is not None:
        follower.followed = True
    return wake


def settle(state: dict[str, Tensor], betas: tuple[float, float]) -> None:
    """Gives the moments of rows that rest, in place, the decays that they have not had yet: only
    then are they what ``torch.optim.Adam`` would hold."""
    asleep = state.get("asleep")
    if asleep is None or not bool(asleep.any()):
        return
    now = int(state["step"])
    for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
        rows = _rows(state[name])
        if rows is None:  # it has never been through the step in Rust
            return
        moments = torch.from_numpy(rows)
        # Some at a time; zeros aren't written to, and go on taking no memory.
        for some in torch.split(asleep.nonzero().flatten(), _SETTLED_ROWS):
            some = some[moments[some].any(dim=1)]
            missed = (now - asleep[some].abs()).double()
            moments[some] = (moments[some] * (beta**missed)[:, None]).float()
    asleep[asleep < 0] = 0
    asleep[asleep > 0] = max(now, 1)


def _plain_step(settings: Settings, state: dict[str, Tensor], parameter: Tensor) -> None:
    """The same, for any dtype and device, from a dense gradient."""
    gradient = parameter.grad
    if gradient is None:
        return
    if settings.unit_rows:
        gradient = turning(gradient, parameter)
    beta1, beta2 = settings.betas
    number = int(state["step"])
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square.sqrt() / (1 - beta2**number) ** 0.5).add_(settings.eps)
    parameter.addcdiv_(mean, root, value=-settings.lr / (1 - beta1**number))
    if settings.unit_rows:
        parameter.div_(parameter.norm(dim=1, keepdim=True).clamp_min(1e-12))


def _rows(tensor: Tensor) -> NDArray[np.float32] | None:
    """As the rows that Rust works on, the same memory; None where it can't."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.is_sparse:
        return None
    tensor = tensor.detach()
    if tensor.dim() != 2:
        tensor = tensor.reshape(1, -1) if tensor.is_contiguous() else tensor
    matrix = feature_major(tensor)
    if matrix is None:
        return None
    array: NDArray[np.float32] = matrix.numpy()
    return array
