"""What does not fit is refused before anything runs, and says what would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from r1sae_fast import FastSAE
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.taps import AddDirection, Apply, Capture, SetFeatures, parse_point

ONES = torch.ones(48)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("model.layers.2.attn", "model.layers.2.self_attn"),
        ("model.layer.3", "model.layers.3"),
        ("layers.3", "model.layers.3"),
        ("model.layers.1.mlps", "model.layers.1.mlp"),
        ("blocks.2.hook_resid_pre", "model.layers.2.input"),
        ("blocks.2.hook_resid_post", "model.layers.2"),
        ("blocks.0.hook_mlp_out", "model.layers.0.mlp"),
        ("model.layers.01", "model.layers.1"),
        ("", "model.layers.0"),
    ],
)
def test_unknown_points(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=r"there is no point") as caught:
        Capture(name)
    assert f"did you mean {nearest!r}?" in str(caught.value)


@pytest.mark.parametrize("point", [-1, True, 1.5, None])
def test_points_that_are_no_names(point: Any) -> None:
    with pytest.raises(ValueError, match="expected a name such as"):
        Capture(point)


def test_names_round_trip() -> None:
    for place in ("", ".input", ".self_attn", ".mlp"):
        assert str(parse_point(f"model.layers.37{place}")) == f"model.layers.37{place}"
    assert str(parse_point("model.layers.5.output")) == str(parse_point(5)) == "model.layers.5"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sae: Capture(4), r"Capture\('model.layers.4'\): layer 4 does not exist"),
        (lambda sae: Capture(1, positions=[4]), "position 4 is out of range: sequence 0 has 3"),
        (lambda sae: Capture(1, positions=[-3]), "position -3 is out of range: sequence 1 has 2"),
        (lambda sae: Capture(1, positions=[[0]]), "given for 1 sequences, expected 2"),
        (lambda sae: Capture(1, sequences=[2]), "sequence 2 does not exist: there are 2"),
        (lambda sae: Capture(1, start=[0, 0, 0]), "start has 3 entries, expected 1 or 2"),
        (lambda sae: Capture(1, out=torch.zeros(9, 47)), "out has the width 47, expected 48"),
        (lambda sae: Capture(1, out=torch.zeros(9, 48, device="meta")), "out lies on meta"),
        (lambda sae: Capture(1, sae=FastSAE(32, 64, 4, mode="topk")), "d_in 32, the model .* 48"),
        (lambda sae: AddDirection(1, torch.ones(47)), "direction has 47 entries, .* 48"),
        (lambda sae: AddDirection(1, ONES, [1.0, 2.0, 3.0]), "strength has 3 entries"),
        (lambda sae: SetFeatures(1, sae, {3: [1.0] * 5}), "target of feature 3 has 5 entries"),
        (lambda sae: Apply(1, lambda x: x[:, :5]), r"gave \(.*, 5\), expected"),
        (lambda sae: Apply(1, lambda x: None), "gave NoneType, expected"),  # type: ignore[arg-type,return-value]  # wrong on purpose
    ],
)
def test_what_does_not_fit_the_call(
    engine: LocalEngine, sae: FastSAE, make: Callable[[FastSAE], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.run([[2, 3, 4], [5, 6]], [make(sae)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sae: Capture(1, segments="answer"), "segment 'answer' is unknown; expected one of"),
        (lambda sae: Capture(1, start=-1), "start is -1, expected a position of 0 or more"),
        (lambda sae: Capture(1, positions=slice(-3, None)), "a slice that counts from the begin"),
        (lambda sae: Capture(1, mode="topk"), "there is none"),
        (lambda sae: Capture(1, sae=sae, dtype=torch.float32), "no buffer"),
        (lambda sae: Capture(1, sae=sae, mode="best"), "mode is 'best'; expected one of"),
        (lambda sae: Capture(1, out=torch.zeros(4)), r"expected a contiguous \[capacity, d_in\]"),
        (lambda sae: AddDirection(1, torch.ones(4, 48)), r"expected floating \[d_in\]"),
        (lambda sae: AddDirection(1, ONES.long()), r"expected floating \[d_in\]"),
        (lambda sae: AddDirection(1, ONES * torch.nan), "direction holds a NaN"),
        (lambda sae: AddDirection(1, ONES, float("inf")), "strength is inf, expected finite"),
        (lambda sae: SetFeatures(1, sae, {}), "no features to set"),
        (lambda sae: SetFeatures(1, sae, {80: 1.0}), "feature 80 does not exist: .* 0 to 79"),
        (lambda sae: SetFeatures(1, sae, {3: float("nan")}), "target of feature 3 is nan"),
        (
            lambda sae: SetFeatures(1, FastSAE(48, 64, 4, mode="batch_topk"), {3: 1.0}),
            "would depend on the tokens",
        ),
        (
            lambda sae: SetFeatures(1, FastSAE(48, 64, 4, mode="topk", transcoder=True), {3: 1.0}),
            "this is a transcoder",
        ),
    ],
)
def test_what_never_fits(sae: FastSAE, make: Callable[[FastSAE], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(sae)
    if "NaN" in message or "finite" in message or "nan" in message:
        assert isinstance(caught.value, NonFiniteError)


def test_layers_that_were_not_loaded(tmp_path: Any) -> None:
    engine = LocalEngine.from_pretrained("tiny-r1", last_layer=1)
    with pytest.raises(ValueError, match=r"'model.layers.2'\): layer 2 was not loaded"):
        engine.run([[2, 3]], [Capture(2)])
    with pytest.raises(ValueError, match="was not loaded"), engine.tap(Capture(3)):
        pass


def test_taps_that_are_not_reached(engine: LocalEngine) -> None:
    with engine.tap(Capture(2)), pytest.raises(ValueError, match="is run after block 1"):
        engine.residuals([[2, 3]], 1)
    assert engine.attached == ()


def test_from_the_end_is_not_known_while_generating(engine: LocalEngine) -> None:
    last = Capture(1, positions=[-1])
    with engine.tap(last), pytest.raises(ValueError, match="position -1 counts from the end"):
        engine.generate([[2, 3]], max_new_tokens=2)


def test_other_mistakes(engine: LocalEngine, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="there are no taps"):
        engine.run([[2, 3]])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        engine.run([[2, 3], []], [Capture(1)])
    with pytest.raises(ValueError, match="batch_size is 0"):
        engine.run([[2, 3]], [Capture(1)], batch_size=0)
    with pytest.raises(ValueError, match="token id 99 is outside"):
        engine.run([[2, 99]], [Capture(1)])
    with pytest.raises(TypeError, match="is no tap; expected Capture"):
        engine.run([[2, 3]], ["model.layers.1"])  # type: ignore[list-item]  # wrong on purpose
    capture = Capture(1)
    with pytest.raises(ValueError, match="attached twice"):
        engine.run([[2, 3]], [capture, capture])
    with pytest.raises(ValueError, match="nothing was run yet"):
        _ = Capture(1).values
    with pytest.raises(ValueError, match="taps attached; harvest outside"), engine.tap(capture):
        harvest(engine, [[2, 3]], 1, tmp_path / "a", mode="prefill")
    assert not (tmp_path / "a").exists()
