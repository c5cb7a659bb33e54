"""Captures: what they hold is what residuals() gives, wherever and whenever it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast import FastSAE, SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.r1.taps import Apply, Capture
from r1sae_fast.r1.taps import capture as capture_module

batches = st.lists(st.lists(st.integers(2, 79), min_size=1, max_size=12), min_size=1, max_size=5)
PLACES = ("", ".input", ".self_attn", ".mlp")


def padded(sequences: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    lengths = [len(sequence) for sequence in sequences]
    rows = [sequence + [0] * (max(lengths) - len(sequence)) for sequence in sequences]
    return torch.tensor(rows), lengths


@given(sequences=batches, layer=st.integers(0, 3))
def test_equals_residuals_to_the_bit(
    shared_engine: LocalEngine, sequences: list[list[int]], layer: int
) -> None:
    capture = Capture(layer)
    shared_engine.run(sequences, [capture])
    tokens, lengths = padded(sequences)
    residuals = shared_engine.residuals(tokens, layer, lengths)
    present = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    assert torch.equal(capture.values, residuals[present])
    place, position = present.nonzero(as_tuple=True)
    assert torch.equal(capture.sequence, place)
    assert torch.equal(capture.position, position)
    for number, length in enumerate(lengths):
        assert torch.equal(capture.of(number), residuals[number, :length])


@given(
    sequences=batches,
    start=st.integers(0, 12),
    stop=st.none() | st.integers(0, 12),
    step=st.integers(1, 3),
    chosen=st.sets(st.integers(0, 4)),
    batch_size=st.integers(1, 5),
)
def test_choices(
    shared_engine: LocalEngine,
    sequences: list[list[int]],
    start: int,
    stop: int | None,
    step: int,
    chosen: set[int],
    batch_size: int,
) -> None:
    """Slices, sequences, starts and batches against plain Python."""
    chosen = {number for number in chosen if number < len(sequences)}
    starts = [number % 4 for number in range(len(sequences))]
    everything = Capture(1)
    capture = Capture(
        1, positions=slice(start, stop, step), sequences=chosen, start=starts, dtype=torch.float64
    )
    shared_engine.run(sequences, [everything, capture], batch_size=batch_size)
    wanted = [
        (number, position)
        for number, sequence in enumerate(sequences)
        if number in chosen
        for position in range(len(sequence))[start:stop:step]
        if position >= starts[number]
    ]
    found = zip(capture.sequence.tolist(), capture.position.tolist(), strict=True)
    assert list(found) == wanted
    assert capture.values.dtype == torch.float64
    for row, (number, position) in zip(capture.values, wanted, strict=True):
        assert torch.equal(row.float(), everything.of(number)[position])


def test_all_points_of_several_layers_at_once(engine: LocalEngine) -> None:
    """The parts of a block add up to its output, and a block's output is the next one's input."""
    names = [f"model.layers.{layer}{place}" for layer in range(4) for place in PLACES]
    captures = {name: Capture(name) for name in names}
    engine.run([[2, 3, 4, 5], [6, 7]], list(captures.values()))
    for layer in range(4):
        name = f"model.layers.{layer}"
        inner = captures[f"{name}.input"].values + captures[f"{name}.self_attn"].values
        assert torch.equal(inner + captures[f"{name}.mlp"].values, captures[name].values)
        if layer < 3:
            following = captures[f"model.layers.{layer + 1}.input"].values
            assert torch.equal(following, captures[name].values)
    embedding = engine.model.embed_tokens(torch.tensor([2, 3, 4, 5, 6, 7]))
    assert torch.equal(captures["model.layers.0.input"].values, embedding)


def test_listed_positions(engine: LocalEngine) -> None:
    sequences = [[2, 3, 4, 5], [6, 7]]
    last, listed, each = (
        Capture(2, positions=[-1]),
        Capture(2, positions=[1, 0]),
        Capture(2, positions=[[3], []]),
    )
    engine.run(sequences, [last, listed, each])
    full = [engine.residuals([sequence], 2)[0] for sequence in sequences]
    expected = torch.stack([full[0][3], full[1][1]])
    torch.testing.assert_close(last.values, expected, rtol=1e-4, atol=1e-4)
    assert listed.position.tolist() == [0, 1, 0, 1]
    assert (each.sequence.tolist(), each.position.tolist()) == ([0], [3])


def test_segments(engine: LocalEngine) -> None:
    sequences = [[0, 5, 80, 6, 7, 81, 8, 9], [0, 5, 80, 6]]
    captures = {name: Capture(1, segments=name) for name in ("prompt", "thinking", "response")}
    both = Capture(1, segments=["prompt", "response"])
    engine.run(sequences, [*captures.values(), both], prompt_lengths=[3, 3])
    assert captures["prompt"].position.tolist() == [0, 1, 0, 1]
    assert captures["thinking"].position.tolist() == [2, 3, 4, 5, 2, 3]
    assert captures["response"].position.tolist() == [6, 7]
    assert len(both) == 6


@pytest.mark.parametrize("batch_size", [2, 5])
def test_while_generating(engine: LocalEngine, batch_size: int) -> None:
    """A row a token that was read, of every sequence, however it left the batch."""
    prompts = [[2, 3, number] + [4] * (number % 3) + [80] for number in range(2, 12)]
    stops = set(range(0, 90, 6))
    capture, inner = Capture(2), Capture("model.layers.1.mlp")
    thinking = Capture(3, segments="thinking")
    chosen = Capture(0, sequences=[1, 7], positions=slice(4, None))
    with engine.tap(capture, inner, thinking, chosen):
        generations = engine.generate(
            prompts, max_new_tokens=9, seed=5, stop_ids=stops, batch_size=batch_size
        )
    assert len({len(g.tokens) for g in generations}) > 3
    for number, generation in enumerate(generations):
        tokens = generation.tokens[:-1]
        whole = {tap: Capture(str(tap.point)) for tap in (capture, inner, thinking, chosen)}
        engine.run([tokens], list(whole.values()))
        for tap in (capture, inner):
            found = tap.position[tap.sequence == number]
            assert sorted(found.tolist()) == list(range(len(tokens)))
            torch.testing.assert_close(tap.of(number), whole[tap].values, rtol=1e-4, atol=1e-4)
        inside = torch.tensor(generation.segments[:-1]) == 1
        expected = whole[thinking].values[inside]
        torch.testing.assert_close(thinking.of(number), expected, rtol=1e-4, atol=1e-4)
        wanted = range(4, len(tokens)) if number in (1, 7) else range(0)
        assert chosen.position[chosen.sequence == number].tolist() == list(wanted)


def test_captures_change_nothing(engine: LocalEngine) -> None:
    tokens = torch.randint(2, 80, (3, 9), generator=torch.Generator().manual_seed(0))
    before = engine.logits(tokens)
    taps = [Capture(f"model.layers.{layer}{place}") for layer in range(4) for place in PLACES]
    with engine.tap(*taps):
        assert torch.equal(engine.logits(tokens), before)
    assert torch.equal(engine.logits(tokens), before)
    assert engine.generate([[2, 3]], seed=1, max_new_tokens=9) == engine.generate(
        [[2, 3]], seed=1, max_new_tokens=9
    )


def test_nothing_runs_after_the_last_tap(engine: LocalEngine) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a block after the last tap was run")

    handle = engine.model.layers[2].register_forward_pre_hook(fail)
    try:
        engine.run([[2, 3]], [Capture(0), Capture("model.layers.1.self_attn")])
        with pytest.raises(AssertionError):
            engine.run([[2, 3]], [Capture(2)])
    finally:
        handle.remove()


def test_buffers_are_used_again(engine: LocalEngine) -> None:
    capture = Capture(1)
    engine.run([[2, 3, 4, 5]], [capture])
    first, place = capture.values.clone(), capture.values.data_ptr()
    engine.run([[2, 3]], [capture])
    assert capture.values.data_ptr() == place
    assert torch.equal(capture.values, engine.residuals([[2, 3]], 1)[0])
    assert len(capture) == 2
    own = torch.zeros(6, 48)
    given_ = Capture(1, out=own)
    engine.run([[2, 3, 4, 5]], [given_])
    assert torch.equal(own[:4], first)
    assert not own[4:].any()
    with pytest.raises(ValueError, match="room for 6 rows, and at least 7 came"):
        engine.run([[2] * 7], [given_])


@given(sequences=batches, mode=st.sampled_from(["topk", "threshold"]))
def test_codes(
    shared_engine: LocalEngine, sae: FastSAE, sequences: list[list[int]], mode: Any
) -> None:
    """Only codes leave, and they are those of the residuals, whatever runs beside them."""
    capture, residual = Capture(1, sae=sae, mode=mode), Capture(1)
    shared_engine.run(sequences, [capture, residual], batch_size=2)
    before, sae.mode = sae.mode, mode
    expected = sae.encode_sparse(residual.values)
    sae.mode = before
    torch.testing.assert_close(capture.codes.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="only codes leave"):
        _ = capture.values
    with pytest.raises(ValueError, match="no SAE is attached"):
        _ = residual.codes


def test_engine_codes(engine: LocalEngine, sae: FastSAE) -> None:
    tokens, lengths = padded([[2, 3, 4], [5], []])
    codes = engine.codes(tokens, 2, sae, lengths)
    assert codes.shape == (3, 3, 80)
    residuals = engine.residuals(tokens, 2, lengths)
    expected = sae.encode(residuals)
    for row, length in enumerate(lengths):
        assert torch.equal(codes.to_dense()[row, :length], expected[row, :length])
        assert not codes.to_dense()[row, length:].any()
    assert codes.counts.tolist() == [[6, 6, 6], [6, 0, 0], [0, 0, 0]]
    assert isinstance(codes.check(), SparseCodes)
    empty = engine.codes(torch.zeros(2, 0, dtype=torch.int64), 2, sae)
    assert empty.shape == (2, 0, 80)


def test_codes_while_generating(engine: LocalEngine, sae: FastSAE) -> None:
    capture, residual = Capture(3, sae=sae), Capture(3)
    with engine.tap(capture, residual):
        engine.generate([[2, 3, 4], [5, 6]], max_new_tokens=7, stop_ids=[])
    assert torch.equal(capture.sequence, residual.sequence)
    expected = sae.encode(residual.values)
    torch.testing.assert_close(capture.codes.to_dense(), expected, rtol=1e-4, atol=1e-4)
    assert capture.codes.rows == 17


def test_rows_are_encoded_together_and_none_is_left(
    engine: LocalEngine, sae: FastSAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's few rows wait for others, but not beyond the call, however it ends."""
    monkeypatch.setattr(capture_module, "_TOGETHER", 10)
    encoded: list[int] = []
    encode = sae.encode_sparse

    def counted(rows: torch.Tensor) -> SparseCodes:
        encoded.append(len(rows))
        return encode(rows)

    monkeypatch.setattr(sae, "encode_sparse", counted)
    capture, residual = Capture(3, sae=sae, mode="threshold"), Capture(3)
    with engine.tap(capture, residual):
        engine.generate([[2, 3, 4], [5, 6]], max_new_tokens=8, stop_ids=[])
        assert encoded == [11, 8]
        expected = encode(residual.values)
        assert capture.codes.counts.shape == (19,)
        encoded.clear()
        engine.residuals(torch.randint(3, 80, (3, 50)), 3)
        assert encoded == [150]
        encoded.clear()
        stream = engine.stream([[2, 3, 4]], max_new_tokens=8, stop_ids=[])
        next(stream), next(stream)
        stream.close()
        assert encoded == []
        assert capture.codes.rows == len(capture) == 4
    assert expected.rows == 19


def test_batch_topk_must_be_asked_for(engine: LocalEngine) -> None:
    free = FastSAE(48, 64, 4, mode="batch_topk")
    with pytest.raises(ValueError, match=r"would depend on the tokens.*calibrate_threshold"):
        Capture(1, sae=free)
    capture = Capture(1, sae=free, mode="batch_topk")
    engine.run([[2, 3, 4]], [capture])
    assert capture.codes.nnz <= 12
    assert free.mode == "batch_topk"
    free.calibrate_threshold(engine.residuals([[2, 3, 4]], 1))
    assert Capture(1, sae=free).mode == "threshold"
    with pytest.raises(ValueError, match="threshold"):
        Capture(1, sae=FastSAE(48, 64, 4, mode="threshold"))


def test_not_finite_values_are_named(engine: LocalEngine, sae: FastSAE) -> None:
    def poison(values: torch.Tensor) -> torch.Tensor:
        return torch.full_like(values, torch.nan)

    bad = Apply(1, poison, positions=[2], sequences=[1])
    with pytest.raises(NonFiniteError, match="at position 2 of sequence 1"):
        engine.run([[2, 3], [4, 5, 6]], [bad, Capture(1, sae=sae)])
