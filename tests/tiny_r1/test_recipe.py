"""The optimiser's mathematics, and that a run resumes to the bit."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1sae_fast.errors import CheckpointError, ShardError
from r1sae_fast.tiny_r1.muon import Optimizer, orthogonalise
from r1sae_fast.tiny_r1.recipe import Recipe, Training

SMALL = Recipe(steps=6, batch_size=4, warm_up=2)


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 24, 40), (1, 32, 32)])
def test_orthogonalise_keeps_directions_and_levels_lengths(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices).float()
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    singular = torch.linalg.svdvals(found)
    assert bool((singular > 0.4).all())
    assert bool((singular < 1.4).all())
    # Its singular vectors are the matrix's own: projected on them it is nearly diagonal.
    inner = u.mT @ found @ vh.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 0.1


def test_adam_part_equals_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    own = Optimizer({}, {"x": ours})
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        gradient = torch.randn(7, 5, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step(0.0, 0.01)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    recipe = Recipe(steps=100, warm_up=10, decay=0.5)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[100] == 0.0
    assert sorted(rates[50:], reverse=True) == rates[50:]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = Training(SMALL, tmp_path / "whole")
    whole.run(lambda figures: None)
    first = Training(SMALL, tmp_path / "parts")
    first.run(lambda figures: None, until=3, report_every=1)
    with pytest.raises(ShardError, match="writer"):
        Training(SMALL, tmp_path / "parts")
    first.lock.release()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5}\n{"step": 6, "lo')  # a run killed after its last saved state
    second = Training(SMALL, tmp_path / "parts")
    assert second.step == 3
    steps = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3]
    second.run(lambda figures: None)
    for name, tensor in whole.master_state().items():
        assert torch.equal(tensor, second.master_state()[name]), name
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    second.lock.release()
    with pytest.raises(CheckpointError, match="another recipe"):
        Training(replace(SMALL, seed=5), tmp_path / "parts")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"state\.safetensors: .*damaged"):
        Training(SMALL, tmp_path)


def test_training_learns(tmp_path: Path) -> None:
    losses = []
    run = Training(replace(SMALL, steps=30, batch_size=8), tmp_path)
    run.run(lambda figures: losses.append(figures["loss"]), report_every=1)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
