"""Edits: what is added where, and that a batch of them is as many single runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast import FastSAE
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.taps import AddDirection, Apply, Capture, SetFeatures

batches = st.lists(st.lists(st.integers(2, 79), min_size=2, max_size=10), min_size=1, max_size=4)
PLACES = ("", ".input", ".mlp", ".self_attn")
POINTS = [f"model.layers.{layer}{place}" for layer in (0, 2) for place in PLACES]
DIRECTION = 2 * torch.randn(48, generator=torch.Generator().manual_seed(3))


@given(sequences=batches, point=st.sampled_from(POINTS), start=st.integers(0, 5))
def test_edit_then_capture(
    shared_engine: LocalEngine, sequences: list[list[int]], point: str, start: int
) -> None:
    """The edit is seen by later taps, not by earlier ones; other tokens are left to the bit."""
    before, after = Capture(point), Capture(point)
    shared_engine.run(sequences, [before, AddDirection(point, DIRECTION, 0.5, start=start), after])
    edited = before.position >= start
    assert torch.equal(after.values[edited], before.values[edited] + 0.5 * DIRECTION)
    assert torch.equal(after.values[~edited], before.values[~edited])


@given(
    sequences=batches,
    point=st.sampled_from(POINTS),
    data=st.data(),
)
def test_a_batch_is_as_many_single_runs(
    shared_engine: LocalEngine, sequences: list[list[int]], point: str, data: st.DataObject
) -> None:
    count = len(sequences)
    starts = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    strengths = data.draw(st.lists(st.floats(-3, 3), min_size=count, max_size=count))
    chosen = data.draw(st.sets(st.integers(0, count - 1)))
    last = Capture(3)
    edit = AddDirection(point, DIRECTION, strengths, start=starts, sequences=chosen)
    shared_engine.run(sequences, [edit, last])
    for number, sequence in enumerate(sequences):
        alone = Capture(3)
        single = AddDirection(point, DIRECTION, strengths[number], start=starts[number])
        shared_engine.run([sequence], [single, alone] if number in chosen else [alone])
        torch.testing.assert_close(last.of(number), alone.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("point", POINTS)
def test_each_step_of_a_generation_is_edited(engine: LocalEngine, point: str) -> None:
    """A batch of prompts with strengths and starts of their own, some of them off, against whole
    passes over single sequences: on the cache and without it the same tokens are chosen."""
    prompts = [[2, 3, 4, 5], [6, 7], [8, 9, 10], [11, 12, 13, 14, 15]]
    strengths = [3.0, -2.0, 4.0, 1.5]
    starts = [3, 4, 0, 6]
    edit = AddDirection(point, DIRECTION, strengths, start=starts, sequences=[0, 1, 3])
    settings: dict[str, Any] = {"max_new_tokens": 10, "greedy": True, "stop_ids": []}
    with engine.tap(edit):
        generations = engine.generate(prompts, **settings)
    plain = engine.generate(prompts, **settings)
    for number in range(4):
        tokens, length = generations[number].tokens, len(prompts[number])
        single = AddDirection(point, DIRECTION, strengths[number], start=starts[number])
        with engine.tap(*([single] if number != 2 else [])):
            chosen = engine.logits([tokens[:-1]])[0].argmax(-1)
        assert tokens[length:] == chosen[length - 1 :].tolist()
        # Up to the edited position nothing may change; and at 2, never.
        free = max(0, (99 if number == 2 else starts[number]) - length + 1)
        assert tokens[: length + free] == plain[number].tokens[: length + free]
    changed = [a.tokens != b.tokens for a, b in zip(generations, plain, strict=True)]
    assert sum(changed) >= 2


def test_rows_that_leave_the_batch_take_their_edits_along(engine: LocalEngine) -> None:
    prompts = [[2, 3, number] for number in range(2, 42)]
    strengths = [float(number % 5) for number in range(40)]
    stops = set(range(0, 90, 5))
    settings: dict[str, Any] = {"max_new_tokens": 12, "seed": 2, "stop_ids": stops}
    with engine.tap(AddDirection(1, DIRECTION, strengths, start=2)):
        together = engine.generate(prompts, batch_size=25, **settings)
    assert len({len(g.tokens) for g in together}) > 4
    for number in (0, 7, 24, 25, 39):
        with engine.tap(AddDirection(1, DIRECTION, strengths[number], start=2)):
            (alone,) = engine.generate([prompts[number]], first_number=number, **settings)
        assert alone.tokens == together[number].tokens


def formula(sae: FastSAE, x: torch.Tensor, targets: dict[int, float], mode: str) -> torch.Tensor:
    """decode(codes with the targets in place) + (x - decode(codes)), densely, in float64."""
    wide = FastSAE.from_tensors(
        sae.config,
        sae.W_dec.double(),
        sae.b_enc.double(),
        sae.b_dec.double(),
        sae.W_enc.double(),
        sae.threshold,
    )
    x = x.double()
    if mode == "relu":
        codes = wide.pre_activations(x).relu()
    else:
        wide.mode = mode  # type: ignore[assignment]  # a Mode
        codes = wide.encode(x)
    error = x - wide.decode(codes)
    changed = codes.clone()
    for feature, target in targets.items():
        changed[:, feature] = target
    return (wide.decode(changed) + error).detach()


@given(
    sequences=batches,
    targets=st.dictionaries(st.integers(0, 79), st.floats(-2, 20), min_size=1, max_size=5),
    mode=st.sampled_from(["relu", "topk", "threshold", "batch_topk"]),
)
def test_set_features_is_the_formula(
    shared_engine: LocalEngine,
    sae: FastSAE,
    sequences: list[list[int]],
    targets: dict[int, float],
    mode: Any,
) -> None:
    before, after = Capture(2), Capture(2)
    edit = SetFeatures(2, sae, targets, mode=mode)
    shared_engine.run(sequences, [before, edit, after])
    expected = formula(sae, before.values, targets, mode)
    # Of float32 products over 48 terms of this size, some roundings.
    bound = 64 * torch.finfo(torch.float32).eps * (1 + expected.abs().max())
    assert (after.values.double() - expected).abs().max() <= bound
    assert sae.mode == "topk"


@pytest.mark.parametrize("mode", ["relu", "topk", "threshold"])
def test_the_current_strength_is_no_edit(engine: LocalEngine, sae: FastSAE, mode: Any) -> None:
    """Set to what they are, features leave the value as it is; the SAE's error stays."""
    before, after = Capture(1), Capture(1)
    engine.run([[2, 3, 4]], [before])
    edit = SetFeatures(1, sae, dict.fromkeys(range(80), 0.0), mode=mode)
    for position, row in enumerate(before.values.clone()):
        engine.run([[2, 3, 4]], [edit])  # prepares current()
        strengths = edit.current(row[None])[0]
        assert bool(strengths.any())
        same = SetFeatures(
            1, sae, dict(enumerate(strengths.tolist())), mode=mode, positions=[position]
        )
        engine.run([[2, 3, 4]], [same, after])
        torch.testing.assert_close(after.values[position], row, rtol=1e-5, atol=1e-5)
        others = [number for number in range(3) if number != position]
        assert torch.equal(after.values[others], before.values[others])


def test_targets_of_each_sequence(engine: LocalEngine, sae: FastSAE) -> None:
    sequences = [[2, 3, 4], [5, 6]]
    after = Capture(1)
    engine.run(sequences, [SetFeatures(1, sae, {3: [5.0, 0.0], 7: 2.0}, mode="relu"), after])
    for number, sequence in enumerate(sequences):
        alone = Capture(1)
        targets = {3: [5.0, 0.0][number], 7: 2.0}
        engine.run([sequence], [SetFeatures(1, sae, targets, mode="relu"), alone])
        torch.testing.assert_close(after.of(number), alone.values, rtol=1e-4, atol=1e-4)


def test_features_while_generating(engine: LocalEngine, sae: FastSAE) -> None:
    prompts = [[2, 3, 4, 5], [6, 7]]
    edit = SetFeatures(1, sae, {3: 40.0, 9: 0.0}, mode="threshold", start=[3, 1])
    before, after = Capture(1), Capture(1)
    with engine.tap(before, edit, after):
        engine.generate(prompts, max_new_tokens=8, stop_ids=[])
    starts = torch.tensor([3, 1])[after.sequence]
    on = after.position >= starts
    assert torch.equal(after.values[~on], before.values[~on])
    expected = formula(sae, before.values[on], {3: 40.0, 9: 0.0}, "threshold")
    torch.testing.assert_close(after.values[on].double(), expected, rtol=1e-4, atol=1e-4)


def test_segments_and_functions(engine: LocalEngine) -> None:
    """An edit of thinking tokens alone begins and ends where the model does."""
    seen: list[int] = []

    def double(values: torch.Tensor) -> torch.Tensor:
        seen.append(len(values))
        return values.double() * 2

    before, after = Capture(0), Capture(0)
    with engine.tap(before, Apply(0, double, segments="thinking"), after):
        (generation,) = engine.generate(
            [[0, 5, 80, 6, 7]], max_new_tokens=30, seed=1, temperature=3.0, stop_ids=[]
        )
    thinking = torch.tensor(generation.segments[:-1]) == 1
    assert sum(seen) == int(thinking.sum())
    assert torch.equal(after.values, torch.where(thinking[:, None], 2, 1) * before.values)


def test_bf16_is_rounded_once(sae: FastSAE) -> None:
    from .conftest import small_engine

    engine = small_engine(torch.bfloat16)
    before, after = Capture(1), Capture(1)
    engine.run([[2, 3, 4]], [before, AddDirection(1, DIRECTION, 0.3), after])
    expected = (before.values.float() + torch.tensor(0.3) * DIRECTION).bfloat16()
    assert torch.equal(after.values, expected)
    engine.run([[2, 3, 4]], [before, SetFeatures(1, sae, {4: 9.0}, mode="relu"), after])
    exact = formula(sae, before.values.float(), {4: 9.0}, "relu")
    error = (after.values.double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8).all())


def test_an_edit_reaches_the_answer(engine: LocalEngine) -> None:
    """And no tap leaves the forward as it was, to the bit."""
    tokens = [[2, 3, 4, 5]]
    before = engine.logits(tokens)
    with engine.tap(AddDirection(1, DIRECTION, start=2)):
        edited = engine.logits(tokens)
        with engine.tap(AddDirection(1, DIRECTION, -1.0, start=2)):
            undone = engine.logits(tokens)
    assert torch.equal(edited[:, :2], before[:, :2])
    assert not torch.isclose(edited[:, 2:], before[:, 2:]).all()
    torch.testing.assert_close(undone, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(engine.logits(tokens), before)
    zero = AddDirection(1, DIRECTION, 0.0)
    with engine.tap(zero):
        assert torch.equal(engine.logits(tokens), before)
