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


def resample(learner: Learner, x: Tensor, number: int, target: Tensor | None = None) -> int:
    """Resets the dead features of ``learner``, and their part of Adam's state.

    Args:
        learner: of each rank its own.
        x: ``[n, d_in]`` standardised rows, the same in all ranks.
        number: of the resampling; with the seed it decides what is drawn.
        target: of a transcoder, which is reset to begin where it is worst: its encoder reads the
            row, its decoder makes what is left over.

    Returns:
        How many features were reset, in all ranks.
    """
    config, parameters, ranks = learner.config, learner.parameters, learner.ranks
    is_dead = learner.unfired_tokens >= config.dead_tokens
    dead = is_dead.nonzero().flatten()
    count = int(ranks.total(dead.numel()))
    if count == 0 or count == config.d_sae:
        return 0
    error = LOSSES[config.mode].forward(learner.sae(), x, config, 1.0, target).error
    badness = error.square().sum(1).double().square().cpu()
    if not bool(badness.isfinite().all()) or not bool(badness.sum() > 0):
        return 0
    # A generator of its own: a run that goes on draws the same, and so do all ranks.
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) % 2**63)
    drawn = torch.multinomial(badness, count, replacement=True, generator=generator)
    first = ranks.before(dead.numel())
    own = drawn[first : first + dead.numel()].to(x.device)
    reads = _unit(x[own] - (0.0 if learner.transcodes else parameters["b_dec"]))
    makes = _unit(-error[own]) if learner.transcodes else reads

    def mean_of_alive(values: Tensor) -> float:
        total = float(values[~is_dead].double().sum())
        return ranks.total(total) / (config.d_sae - count)

    size = mean_of_alive(parameters["encoder"].norm(dim=1)) * _ENCODER_SHARE
    fresh = {"encoder": reads * size, "decoder": makes, "b_enc": torch.zeros(())}
    if "log_threshold" in parameters:
        fresh["log_threshold"] = torch.tensor(mean_of_alive(parameters["log_threshold"]))
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
    learner.weights_changed(is_dead, is_dead)
    return count


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit
