"""Dead features get another start (Bricken et al., "Towards Monosemanticity", 2023, appendix).

Each takes the direction of a row of the batch, drawn by the square of how badly it is explained;
its encoder weights are a fifth of the others' mean norm, so that it begins by firing seldom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1sae_fast.train.losses import LOSSES

if TYPE_CHECKING:
    from r1sae_fast.train.step import Learner

_ENCODER_SHARE = 0.2


def resample(learner: Learner, x: Tensor, number: int) -> int:
    """Resets the dead features of ``learner``, and their part of Adam's state.

    Args:
        learner: all of whose features are this process's.
        x: ``[n, d_in]`` standardised rows.
        number: of the resampling; with the seed it decides what is drawn.

    Returns:
        How many features were reset.
    """
    config, parameters = learner.config, learner.parameters
    is_dead = learner.unfired_tokens >= config.dead_tokens
    dead = is_dead.nonzero().flatten()
    alive = (~is_dead).nonzero().flatten()
    if not dead.numel() or not alive.numel():
        return 0
    error = LOSSES[config.mode].forward(learner.sae(), x, config, 1.0).error
    badness = error.square().sum(1).double().square().cpu()
    if not bool(badness.isfinite().all()) or not bool(badness.sum() > 0):
        return 0
    # A generator of its own: a run that goes on draws the same.
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) % 2**63)
    drawn = torch.multinomial(badness, dead.numel(), replacement=True, generator=generator)
    rows = x[drawn.to(x.device)] - parameters["b_dec"]
    directions = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    size = parameters["encoder"][alive].norm(dim=1).mean() * _ENCODER_SHARE
    fresh = {"encoder": directions * size, "decoder": directions, "b_enc": torch.zeros(())}
    if "log_threshold" in parameters:
        fresh["log_threshold"] = parameters["log_threshold"][alive].mean()
    for name, values in fresh.items():
        if name not in parameters:
            continue
        parameters[name][dead] = values.to(x.device)
        state = learner.adam_state[name]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment][dead] = 0.0
        # A vector is one row to Adam.
        if "asleep" in state and parameters[name].dim() == 2:
            state["asleep"][dead] = 0
    learner.unfired_tokens[dead] = 0
    learner.screen.refresh(dead)
    return int(dead.numel())
