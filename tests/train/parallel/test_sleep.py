"""Vectors that sleep in one rank are awake in the checkpoint that all share."""

import pytest
import torch

from r1sae_fast.train import TrainConfig
from r1sae_fast.train.parallel.ranks import ALONE, Alone
from r1sae_fast.train.step import Learner


class Half(Alone):
    """The first of two that share out the features; it isn't asked for the other's numbers."""

    def own(self, d_sae: int) -> tuple[int, int]:
        return 0, d_sae // 2


@pytest.mark.parametrize(("ranks", "size"), [(Half(), 16), (ALONE, 32)], ids=["half", "alone"])
def test_vectors_wake_where_features_are_split(ranks: Alone, size: int) -> None:
    config = TrainConfig(d_sae=32, k=3, tokens=1000, batch_size=50)
    learner = Learner(config, 8, torch.device("cpu"), ranks=ranks)
    learner.adam_state["b_enc"] = {
        "step": torch.tensor(10.0),
        "exp_avg": torch.ones(size),
        "exp_avg_sq": torch.ones(size),
        "asleep": torch.tensor([4]),
        "least_rate": torch.tensor(1e-3),
    }
    learner.wake_vectors()
    state = learner.adam_state["b_enc"]
    alone = size == 32
    # Six decays were missed. One process's state is left as it is.
    assert state["asleep"].tolist() == [4 if alone else 0]
    for name, beta in zip(("exp_avg", "exp_avg_sq"), config.betas, strict=True):
        expected = torch.full((size,), 1.0 if alone else beta**6)
        torch.testing.assert_close(state[name], expected)
