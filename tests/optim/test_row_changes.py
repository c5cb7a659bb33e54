"""What Adam tells a screen about the rows it has moved."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1sae_fast import FastSAE, ops
from r1sae_fast.ops import RowChanges
from r1sae_fast.optim import Adam


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["note", "silent", "take"]), st.integers(0, 7))))
def test_an_answer_names_every_row_that_moved(steps: list[tuple[str, int]]) -> None:
    changes, weights = RowChanges(8), torch.zeros(8)
    copied, copy = 0, weights.clone()
    version = 0
    for what, row in steps:
        if what == "take":
            rows = changes.take(copied, version)
            copy = weights.clone() if rows is None else copy.index_copy(0, rows, weights[rows])
            assert torch.equal(copy, weights)
            copied = version
            continue
        weights[row] += 1
        version += 1
        if what == "note":
            changes.note(version - 1, version, torch.arange(8) == row)


def test_a_chain_of_notes_is_an_answer() -> None:
    changes = RowChanges(5)
    assert changes.take(0, 0) is not None  # nothing happened
    assert changes.take(0, 3) is None
    changes.note(3, 4, torch.tensor([False, True, False, False, False]))
    changes.note(4, 5, torch.tensor([False, True, False, True, False]))
    assert changes.take(3, 5).tolist() == [1, 3]  # type: ignore[union-attr]  # it is known
    changes.note(5, 6, None)
    assert changes.take(5, 6) is None


@pytest.mark.parametrize("untouched", ["decay", "freeze"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_codes_in_training_are_those_of_a_new_screen(
    untouched: str, tied: bool, unit_rows: bool
) -> None:
    torch.manual_seed(0)
    model = FastSAE(24, 300, 3, "topk", tied=tied)
    model.screen, model.sparse_grad = "int8", True
    matrices = [model.W_dec] if tied else [model.W_dec, model.W_enc]
    groups = [
        {"params": [model.b_enc, model.b_dec]},
        {"params": matrices[:1], "unit_rows": unit_rows},
        {"params": matrices[1:]},
    ]
    adam = Adam([g for g in groups if g["params"]], lr=0.01, untouched=untouched)  # type: ignore[arg-type]  # tests
    for step in range(60):
        x = torch.randn(5, 24)
        W, b = model.W_enc.detach().T.clone(), model.b_enc.detach().clone()
        reconstruction, codes = model(x)
        fresh = ops.Screen(W, b, "int8").topk(x, 3)
        assert torch.equal(codes.indices, fresh.indices)
        assert torch.equal(codes.values, fresh.values)
        assert model.explain().violations == 0
        assert model._screen is not None
        assert torch.equal(model._screen._W, W)
        (reconstruction - x).square().mean().backward()
        adam.step()
        adam.zero_grad()
        if step == 30:
            with torch.no_grad():
                model.W_dec[7] *= 2  # what nobody notes
                model.W_enc[:, 9] *= 2


def test_frozen_rows_are_not_rounded_again() -> None:
    torch.manual_seed(1)
    model = FastSAE(16, 200, 2, "topk", tied=True)
    model.screen, model.sparse_grad = "int8", True
    adam = Adam([model.W_dec], lr=0.01, untouched="freeze")
    for _ in range(3):
        reconstruction, codes = model(torch.randn(4, 16))
        before, version = model.W_dec.detach().clone(), model.W_dec._version
        reconstruction.square().mean().backward()
        adam.step()
        adam.zero_grad()
        rows = model.W_dec.row_changes.take(version, model.W_dec._version)  # type: ignore[attr-defined]  # ours
        assert set(rows.tolist()) == set(codes.indices.tolist())
        changed = (model.W_dec.detach() != before).any(1).nonzero().flatten()
        assert set(changed.tolist()) <= set(rows.tolist())
