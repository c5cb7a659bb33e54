"""evaluate_answers(): TinyR1 with an SAE in the loop of its generation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.evals import evaluate_all_answers, evaluate_answers
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.tiny_r1 import evaluate

LAYER = 2


@pytest.fixture(scope="module")
def tiny() -> LocalEngine:
    return LocalEngine.from_pretrained("tiny-r1", dtype=torch.bfloat16)


def test_a_perfect_sae_changes_nothing(
    tiny: LocalEngine, make_identity: Callable[[int], FastSAE]
) -> None:
    found = evaluate_answers(make_identity(256), tiny, LAYER, count=6)
    assert found.problems == 6
    assert found.accuracy == found.accuracy_clean > 0
    assert (found.same_text, found.well_formed) == (1.0, found.well_formed_clean)
    assert sum(found.by_family.values()) > 0
    assert 250 < found.l0 <= 256
    assert (found.point, found.mode) == ("model.layers.2", "topk")
    assert tiny.attached == ()


def test_a_zero_sae_changes_everything(
    tiny: LocalEngine, make_zero: Callable[[int], FastSAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The grader cuts what has no end.
    monkeypatch.setattr(evaluate, "_MAX_NEW_TOKENS", 12)
    saes = [make_zero(256), make_zero(256)]
    saes[1].metadata["norm_limit"] = 1e-6  # so nothing is replaced
    nothing, left_alone = evaluate_all_answers(saes, tiny, LAYER, count=3)
    assert (nothing.accuracy, nothing.same_text, nothing.well_formed) == (0.0, 0.0, 0.0)
    assert (nothing.standard_error, nothing.l0) == (0.0, 0.0)
    assert left_alone.same_text == 1.0


def test_bad_input(tiny: LocalEngine, make_zero: Callable[[int], FastSAE]) -> None:
    with pytest.raises(ValueError, match="layer 4 does not exist"):
        evaluate_answers(make_zero(256), tiny, 4)
    with pytest.raises(ValueError, match="d_in 255, the model tiny-r1 a residual stream of 256"):
        evaluate_answers(make_zero(255), tiny, LAYER)
    with pytest.raises(ValueError, match="count is 0"):
        evaluate_answers(make_zero(256), tiny, LAYER, count=0)
