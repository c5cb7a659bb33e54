"""The AUROC is right, and a detector is measured on steps that did not choose it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast import SparseCodes
from r1sae_fast.demo.detect import StepTable, auroc, detect
from r1sae_fast.demo.steps import MOMENTS, Step
from r1sae_fast.shards import ActivationShards, ActivationWriter, CodeShards, CodeWriter

D_SAE = 40


@given(
    values=st.lists(st.integers(0, 4), min_size=2, max_size=40),
    seed=st.integers(0, 2**32),
)
def test_auroc_is_the_probability_over_pairs(values: list[int], seed: int) -> None:
    column = torch.tensor(values, dtype=torch.float32)
    wrong = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.5
    wrong[0], wrong[1] = True, False
    pairs = [
        (w > r) + (w == r) / 2 for w in column[wrong].tolist() for r in column[~wrong].tolist()
    ]
    found = auroc(torch.stack([column, -column], dim=1), wrong)
    assert found.tolist() == pytest.approx([np.mean(pairs), 1 - np.mean(pairs)])


def make(tmp_path: Path, wrong: torch.Tensor, dense: torch.Tensor) -> tuple[
    CodeShards, ActivationShards, StepTable
]:  # fmt: skip
    """One step a sequence of four tokens, a token a moment; the same codes at each of them."""
    steps = [
        [Step("1 plus 1", "2", bool(is_wrong), False, dict(zip(MOMENTS, range(4), strict=True)))]
        for is_wrong in wrong
    ]
    rows = dense.repeat_interleave(4, dim=0)
    with CodeWriter(tmp_path / "codes", D_SAE) as codes:
        codes.write(SparseCodes.from_dense(rows))
    with ActivationWriter(tmp_path / "activations", D_SAE, dtype="float32") as activations:
        activations.write(rows)
    table = StepTable.of(steps, [4] * len(steps))
    return CodeShards(tmp_path / "codes"), ActivationShards(tmp_path / "activations"), table


def test_the_planted_detector_is_found(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(400, generator=generator) < 0.3
    dense = torch.rand(400, D_SAE, generator=generator)
    dense[:, 7] = torch.where(wrong, 1.0, 0.0) + 0.8 * torch.rand(400, generator=generator)
    codes, activations, table = make(tmp_path, wrong, dense)
    found = detect(codes, activations, table, codes, table, seed=0)
    assert [one.moment for one in found] == list(MOMENTS)
    half = torch.arange(400) % 2 == 1
    expected = float(auroc(dense[half][:, [7]], wrong[half]))
    for one in found:
        assert one.feature == 7
        assert one.auroc == pytest.approx(expected)
        assert one.low <= one.auroc <= one.high
        assert (one.wrong, one.right) == (int(wrong[half].sum()), int((~wrong[half]).sum()))
        assert one.probe_auroc > 0.95
        assert one.own_auroc == pytest.approx(float(auroc(dense[:, [7]], wrong)))


def test_noise_is_not_found_to_tell_anything(tmp_path: Path) -> None:
    """The best of forty features of noise looks good where it was chosen, and there alone."""
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(200, generator=generator) < 0.3
    codes, activations, table = make(tmp_path, wrong, torch.rand(200, D_SAE, generator=generator))
    found = detect(codes, activations, table, codes, table, seed=0)
    assert found[0].auroc_where_chosen > 0.6
    assert found[0].low < 0.5 < found[0].high
    assert found[0].high - found[0].low > 0.1


def test_too_few_steps(tmp_path: Path) -> None:
    wrong = torch.arange(30) < 5
    codes, activations, table = make(tmp_path, wrong, torch.rand(30, D_SAE))
    assert detect(codes, activations, table, codes, table, seed=0) == []


def test_own_steps_that_are_too_few_are_not_judged(tmp_path: Path) -> None:
    wrong = torch.arange(200) % 3 == 0
    codes, activations, table = make(tmp_path, wrong, torch.rand(200, D_SAE))
    own = StepTable.of([], [])
    found = detect(codes, activations, table, codes, own, seed=0)
    assert {one.own_auroc for one in found} == {None}
