"""Adam that takes factored gradients row by row and never writes them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from r1sae_fast.optim.factored import factored_gradient
from r1sae_fast.optim.update import Settings, Untouched, settle, update

__all__ = ["Adam"]


class Adam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980), as ``torch.optim.Adam``, but for gradients that are factored.

    On float32 parameters on the CPU one pass over a matrix sums each row's gradient in cache,
    takes the step and drops the gradient; a row without codes has its moments decayed and moves
    on, as in ``torch.optim.Adam`` (equal to rounding). All other parameters, and dense ``.grad``,
    take the same step in plain torch, or in that pass where they can. Its state is named as
    torch's, so that state dicts go both ways; read moments there, as in ``optimizer.state`` those
    of rows without codes lag behind (``"asleep"``: the last step that they know of).

    Args:
        params: parameters or groups. A group may set ``unit_rows=True``: its matrices' rows are of
            norm 1 and stay so; of their gradients only what turns the rows counts.
        lr: learning rate, at least 0.
        betas: decays of the mean and of the mean square, from 0 to below 1.
        eps: added to the root of the mean square.
        untouched: "decay", or "freeze": rows without codes, weight and moments, are left as they
            are, as ``torch.optim.SparseAdam`` does. That saves their share of the memory traffic,
            and trains differently: a rare feature keeps its momentum until it fires again.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        untouched: Untouched = "decay",
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "untouched": untouched, "unit_rows": False,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            for name, value in (("lr", group["lr"]), ("eps", group["eps"])):
                if not value >= 0.0:
                    raise ValueError(f"{name} is {value}; expected at least 0")
            for value in group["betas"]:
                if not 0.0 <= value < 1.0:
                    raise ValueError(f"betas are {group['betas']}; expected 0 to below 1")
            if group["untouched"] not in ("decay", "freeze"):
                raise ValueError(
                    f"untouched is {group['untouched']!r}; expected 'decay' or 'freeze'"
                )
            for parameter in group["params"] if group["unit_rows"] else ():
                if parameter.dim() != 2:
                    raise ValueError(
                        f"unit_rows for a parameter of shape {tuple(parameter.shape)}; "
                        "expected matrices only"
                    )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, whose Adam may go on from it: rows that rest or sleep get the decays that
        they have not had yet, in place."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state and group["untouched"] == "decay":
                    settle(self.state[parameter], group["betas"])
        return super().state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, factored ones too."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.factored_grad = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with the gradients that are there; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = ("betas", "eps", "untouched", "unit_rows")
            settings = Settings(float(group["lr"]), **{name: group[name] for name in names})
            for parameter in group["params"]:
                if parameter.grad is not None or factored_gradient(parameter) is not None:
                    update(parameter, self.state[parameter], settings)
        return loss
