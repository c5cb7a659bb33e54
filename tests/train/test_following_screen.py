"""A screen's copy of the encoder is rounded within Adam's step, where it can be."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.ops.screen import ScreenKind
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.step import Learner


def learner(kind: ScreenKind, seed: int, **settings: object) -> Learner:
    config = TrainConfig(150, 4, "topk", **settings)  # type: ignore[arg-type]  # from tests
    made = Learner(config, 63, torch.device("cpu"))
    made.screen = ops.Screen(made.parameters["encoder"], made.parameters["b_enc"], kind, seed=seed)
    return made


@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adam", ["dense", "sparse"])
def test_a_screen_that_follows_is_one_that_was_rounded_again(
    monkeypatch: pytest.MonkeyPatch, kind: ScreenKind, tied: bool, adam: str
) -> None:
    settings = {"tied": tied, "adam": adam, "aux_coefficient": 0.0}
    follows, rounds = (learner(kind, 1, **settings) for _ in range(2))
    monkeypatch.setattr(rounds.screen, "following", nullcontext)

    def refused(rows: Tensor | None = None) -> None:
        raise AssertionError("it was to be rounded on the way")

    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        x = torch.randn(20, 63, generator=generator)
        if number == 1:  # from when on there is a copy
            monkeypatch.setattr(follows.screen, "refresh", refused)
        for one in (follows, rounds):
            one.step(x, 1e-2)
        for name, tensor in follows.parameters.items():
            assert torch.equal(tensor, rounds.parameters[name])
    report = follows.screen.explain()
    # As many exact products, so the bounds were the same.
    assert report == rounds.screen.explain()
    assert (report.rows, report.violations) == (120, 0)


def test_where_dead_features_learn_by_products_it_is_rounded_again() -> None:
    one = learner("int8", 1, dead_after_tokens=9, aux_k=20)
    generator = torch.Generator().manual_seed(0)
    one.parameters["b_enc"][::2] = -3.0
    for number in range(6):
        figures = one.step(torch.randn(20, 63, generator=generator), 1e-2)
        assert number == 0 or figures.dead > 0
    x = torch.randn(20, 63, generator=generator)
    fresh = ops.Screen(one.parameters["encoder"], one.parameters["b_enc"], "int8", seed=1)
    assert torch.equal(one.screen.topk(x, 4).values, fresh.topk(x, 4).values)
    assert one.screen.explain().violations == 0


def test_a_step_that_fails_leaves_a_screen_to_be_rounded_again() -> None:
    one = learner("int8", 1, aux_coefficient=0.0)
    x = torch.randn(20, 63, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        one.step(x, 1e-2)

    def fails() -> None:
        with one.screen.following() as follower:
            assert follower is not None
            one.parameters["encoder"].mul_(2.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    fresh = ops.Screen(one.parameters["encoder"], one.parameters["b_enc"], "int8", seed=1)
    assert torch.equal(one.screen.topk(x, 4).values, fresh.topk(x, 4).values)
    # A copy of other weights than these is not followed.
    one.parameters["encoder"].mul_(2.0)
    with one.screen.following() as follower:
        assert follower is None
