"""evaluate_in_model(): against plain forward hooks on the model itself, and dense arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from r1sae_fast import FastSAE
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.evals import (
    InModel,
    Losses,
    evaluate_all_in_model,
    evaluate_in_model,
    evaluate_reconstruction,
    losses,
)
from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import HfEngine, LocalEngine
from r1sae_fast.r1.segments import Segment
from r1sae_fast.shards import ActivationShards

LAYER = 1


@pytest.fixture
def sae() -> FastSAE:
    torch.manual_seed(0)
    sae = FastSAE(32, 80, 6, mode="topk").requires_grad_(False)
    sae.b_dec.normal_(std=0.3)
    return sae


def hooked_logits(
    forward: Callable[[Tensor], Tensor],
    block: nn.Module,
    tokens: list[int],
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    """One text through the whole model, with a forward hook of torch's own on one block."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        value = output if whole else output[0]
        value = change(value.flatten(0, 1)).view_as(value)
        return value if whole else (value, *output[1:])

    handle = block.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return forward(torch.tensor([tokens]))[0]
    finally:
        handle.remove()


def expected(
    logits_of: Callable[[list[int], Callable[[Tensor], Tensor]], Tensor],
    engine: LocalEngine | HfEngine,
    texts: list[list[int]],
    sae: FastSAE,
    limit: float = math.inf,
) -> dict[str | None, dict[str, float]]:
    """The figures by segment, and of all (None), one text at a time."""
    long = [tokens for tokens in texts if len(tokens) > 1]
    whole = torch.cat([engine.residuals([tokens], LAYER)[0] for tokens in long])
    mean = whole[whole.norm(dim=1) <= limit].double().mean(0).float()

    def kept(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(x.norm(dim=1, keepdim=True) <= limit, change(x), x)

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda x: x,
        "sae": kept(lambda x: sae(x)[0]),
        "zero": kept(torch.zeros_like),
        "mean": kept(lambda x: mean.expand_as(x)),
    }
    found: dict[str | None, list[dict[str, float]]] = {}
    for tokens in long:
        log_p = {
            name: logits_of(tokens, change).double().log_softmax(1)
            for name, change in changes.items()
        }
        segments = engine.segments(tokens)
        for at in range(len(tokens) - 1):
            figures = {}
            p = log_p["clean"][at]
            for name, own in log_p.items():
                figures[f"ce_{name}"] = -float(own[at, tokens[at + 1]])
                figures[f"kl_{name}"] = float((p.exp() * (p - own[at])).sum())
            name = Segment(segments[at + 1]).name.lower()
            found.setdefault(name, []).append(figures)
            found.setdefault(None, []).append(figures)
    return {
        name: {
            "tokens": len(each),
            **{key: sum(one[key] for one in each) / len(each) for key in each[0]},
        }
        for name, each in found.items()
    }


def check(found: InModel, wanted: dict[str | None, dict[str, float]]) -> None:
    assert set(found.segments) == {name for name in wanted if name is not None}
    parts: dict[str | None, Losses] = {None: found, **found.segments}
    for segment, figures in wanted.items():
        for name, value in figures.items():
            if name != "kl_clean":
                got = getattr(parts[segment], name)
                assert got == pytest.approx(value, rel=2e-4, abs=2e-5), (segment, name)
        ablated, spliced = figures["ce_zero"], figures["ce_sae"]
        assert parts[segment].ce_recovered_zero == pytest.approx(
            (ablated - spliced) / (ablated - figures["ce_clean"]), rel=1e-2
        )


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_figures_are_those_of_a_plain_hook(
    engine: LocalEngine, texts: list[list[int]], sae: FastSAE, batch_size: int
) -> None:
    def logits_of(tokens: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
        block = engine.model.layers[LAYER]
        return hooked_logits(engine.logits, block, tokens, change)

    found = evaluate_in_model(sae, engine, texts, LAYER, batch_size=batch_size, norm_limit=math.inf)
    check(found, expected(logits_of, engine, texts, sae))
    assert (found.sequences, found.left_out) == (4, 0)
    assert found.positions == sum(len(tokens) for tokens in texts if len(tokens) > 1)
    assert (found.point, found.mode, found.l0) == ("model.layers.1", "topk", 6.0)
    # What is left alone for its norm.
    norms = torch.cat([engine.residuals([t], LAYER)[0] for t in texts if len(t) > 1]).norm(dim=1)
    limit = float(norms.sort().values[-5:-3].mean())
    some = evaluate_in_model(sae, engine, texts, LAYER, batch_size=batch_size, norm_limit=limit)
    check(some, expected(logits_of, engine, texts, sae, limit))
    assert (some.left_out, some.positions) == (4, found.positions - 4)
    sae.metadata["norm_limit"] = limit
    told = evaluate_in_model(sae, engine, texts, LAYER, batch_size=batch_size)
    assert told == some
    assert engine.attached == ()


def test_on_a_transformers_model(texts: list[list[int]], sae: FastSAE) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=62,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    engine = HfEngine(model, name="llama")

    def logits_of(tokens: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
        def forward(ids: Tensor) -> Tensor:
            logits: Tensor = model(ids).logits
            return logits

        return hooked_logits(forward, model.model.layers[LAYER], tokens, change)

    found = evaluate_in_model(sae, engine, texts, LAYER, batch_size=3, norm_limit=math.inf)
    check(found, expected(logits_of, engine, texts, sae))


def test_perfect_and_zero_saes(
    engine: LocalEngine, texts: list[list[int]], perfect: FastSAE, zero: FastSAE, sae: FastSAE
) -> None:
    every = evaluate_all_in_model([perfect, zero, sae], engine, texts, LAYER)
    found, nothing, some = every
    assert found.ce_sae == found.ce_clean
    assert (found.ce_recovered_zero, found.ce_recovered_mean, found.kl_sae) == (1.0, 1.0, 0.0)
    assert found.fvu == 0.0
    assert nothing.ce_recovered_zero == 0.0
    assert nothing.kl_sae == nothing.kl_zero
    assert nothing.l0 == 0.0
    assert some == evaluate_in_model(sae, engine, texts, LAYER)


def test_it_sees_the_rows_that_are_harvested(
    engine: LocalEngine, texts: list[list[int]], sae: FastSAE, tmp_path: Path
) -> None:
    long = [tokens for tokens in texts if len(tokens) > 1]
    harvest(engine, long, LAYER, tmp_path / "acts", mode="prefill", dtype="float32", batch_size=8)
    shards = evaluate_reconstruction(sae, ActivationShards(tmp_path / "acts"), norm_limit=math.inf)
    inside = evaluate_in_model(sae, engine, long, LAYER, norm_limit=math.inf)
    assert inside.fvu == pytest.approx(shards.fvu, rel=1e-5)
    assert (inside.positions, inside.l0) == (shards.rows, shards.l0)


def test_conversations_have_segments(engine: LocalEngine, sae: FastSAE) -> None:
    item = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "this"},
    ]
    found = evaluate_in_model(sae, engine, [item, "some text"], LAYER)
    assert {name: part.tokens for name, part in found.segments.items()} == {
        "prompt": 5,
        "thinking": 6,  # <think>, which the template opens, four letters, and the end
        "unknown": 9,
    }
    data = json.loads(json.dumps(found.to_json()))
    assert data["segments"]["thinking"]["ce_sae"] == found.segments["thinking"].ce_sae
    assert data["ce_recovered_zero"] == found.ce_recovered_zero


@given(
    st.integers(0, 2**31 - 1), st.integers(0, 9), st.integers(1, 30), st.sampled_from([16, 1 << 20])
)
def test_losses_are_torchs(seed: int, rows: int, vocab: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(rows, vocab, generator=generator) * 10
    other = clean + torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_CHUNK_NUMBERS", chunk)
        found = losses.cross_entropies(clean, targets)
        kl = losses.divergences(clean, other)
    nll = nn.functional.cross_entropy(clean.double(), targets, reduction="none")
    torch.testing.assert_close(found, nll)
    log_p, log_q = clean.double().log_softmax(1), other.double().log_softmax(1)
    wanted = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(kl, wanted)
    assert bool((losses.divergences(clean, clean) == 0).all())


def test_an_impossible_token_adds_nothing() -> None:
    clean = torch.tensor([[0.0, -math.inf, 1.0]])
    other = torch.tensor([[0.5, -math.inf, 1.0]])
    both = losses.divergences(clean, other)
    torch.testing.assert_close(both, losses.divergences(clean[:, [0, 2]], other[:, [0, 2]]))


def test_ablation_that_does_no_harm() -> None:
    same = Losses(3, 1.0, 1.5, 1.0, 2.0, 0.1, 0.0, 0.2)
    assert math.isnan(same.ce_recovered_zero)
    assert same.ce_recovered_mean == 0.5


def test_bad_input(engine: LocalEngine, texts: list[list[int]], sae: FastSAE) -> None:
    def run(one: FastSAE = sae, given: Any = texts, layer: int = LAYER, **rest: Any) -> InModel:
        return evaluate_in_model(one, engine, given, layer, **rest)

    with pytest.raises(ValueError, match="layer 3 does not exist: the model has 0 to 2"):
        run(layer=3)
    with pytest.raises(ValueError, match="SAE has d_in 31, the model small a residual stream of"):
        run(FastSAE(31, 62, 3, mode="topk"))
    with pytest.raises(ValueError, match="no text of two tokens"):
        run(given=[])
    with pytest.raises(ValueError, match="no text of two tokens"):
        run(given=[[3], [4]])
    with pytest.raises(ValueError, match="prompt 1: token id 99 is outside the vocabulary"):
        run(given=[[3, 4], [4, 99]])
    with pytest.raises(ValueError, match="chooses its codes by batch_topk"):
        run(FastSAE(32, 64, 3))
    with pytest.raises(ValueError, match="but this SAE has none; calibrate it"):
        run(mode="threshold")
    with pytest.raises(ValueError, match="SAE 2 of 2: the SAE has d_in 31"):
        evaluate_all_in_model([sae, FastSAE(31, 62, 3)], engine, texts, LAYER)
    with pytest.raises(ValueError, match="there are no SAEs"):
        evaluate_all_in_model([], engine, texts, LAYER)
    with pytest.raises(ValueError, match="batch_size is 0"):
        run(batch_size=0)
    with pytest.raises(ValueError, match="norm_limit is -1"):
        run(norm_limit=-1)
    with pytest.raises(ValueError, match="each of 41 residuals after layer 1 has a norm above"):
        run(norm_limit=1e-6)
    assert run(FastSAE(32, 64, 3), mode="batch_topk").l0 == pytest.approx(3.0, abs=0.5)


def test_nan_in_the_model(texts: list[list[int]], sae: FastSAE, engine: LocalEngine) -> None:
    weight = engine.model.embed_tokens.weight
    before = weight[texts[0][1]].clone()
    try:
        weight[texts[0][1], 0] = math.nan
        with pytest.raises(NonFiniteError, match="in the model: x holds a NaN"):
            evaluate_in_model(sae, engine, texts, LAYER, norm_limit=math.inf)
    finally:
        weight[texts[0][1]] = before
    assert engine.attached == ()
