"""A step's hand-written gradients against autograd on the dense definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast import ops
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.gradients import Rows, backward, decode
from r1sae_fast.train.step import Learner

CPU = torch.device("cpu")


def learner(d_in: int, seed: int, **settings: object) -> Learner:
    """A learner with random weights, so that nothing cancels by the initialisation's symmetry."""
    result = Learner(TrainConfig(**settings), d_in, CPU)  # type: ignore[arg-type]  # from tests
    generator = torch.Generator().manual_seed(seed)
    for tensor in result.parameters.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return result


def selected(pre: Tensor, k: int, mode: str) -> Tensor:
    """The dense codes by the references of the operations."""
    operation = ops.batch_topk if mode == "batch_topk" else ops.topk
    kept = operation(pre.detach(), k).to_dense() > 0
    return pre * kept


def dense_gradients(of: Learner, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    """By autograd, from the definition of the loss."""
    config = of.config
    weights = {name: tensor.clone().requires_grad_() for name, tensor in of.parameters.items()}
    encoder = weights["encoder"]
    decoder = weights.get("decoder", encoder)
    pre = x @ encoder.T + weights["b_enc"]
    reconstruction = selected(pre, config.k, config.mode) @ decoder + weights["b_dec"]
    loss = (reconstruction - x).square().mean()
    if len(dead):
        leftover = (x - reconstruction).detach()
        k = min(config.resolved_aux_k(of.d_in), len(dead))
        explained = selected(pre[:, dead], k, "topk") @ decoder[dead]
        aux = (leftover - explained).square().sum() / leftover.square().sum()
        loss = loss + config.aux_coefficient * aux
    loss.backward()
    return {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}


@pytest.mark.parametrize("mode", ["batch_topk", "topk"])
@pytest.mark.parametrize("tied", [False, True])
@given(
    rows=st.integers(1, 70),
    d_in=st.sampled_from([1, 5, 63]),
    d_sae=st.sampled_from([4, 63, 123]),
    k=st.integers(1, 4),
    dead=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_gradients_are_those_of_the_dense_definition(
    mode: str, tied: bool, rows: int, d_in: int, d_sae: int, k: int, dead: int, seed: int
) -> None:
    mine = learner(
        d_in, seed, d_sae=d_sae, k=k, mode=mode, tied=tied, aux_coefficient=0.5, aux_k=2,
        dead_after_tokens=1000,
    )  # fmt: skip
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed))
    pre = x @ mine.parameters["encoder"].T + mine.parameters["b_enc"]
    fires = (selected(pre, k, mode) != 0).any(0)
    quiet = (~fires).nonzero().flatten()[:dead]
    mine.unfired_tokens[quiet] = 1000
    expected = dense_gradients(mine, x, quiet)
    figures, found = mine.gradients(x)
    assert figures.dead == len(quiet)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * size + 1e-9)


def test_rows_without_codes() -> None:
    codes = Rows(
        torch.empty(0), torch.empty(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    )
    assert torch.equal(decode(codes, torch.ones(5, 2)), torch.zeros(3, 2))
    for gradient in backward(codes, torch.ones(3, 2), torch.ones(5, 2), torch.ones(3, 2)):
        assert not gradient.any()


def test_the_decoder_keeps_unit_rows_and_its_gradient_only_turns_them() -> None:
    mine = Learner(TrainConfig(d_sae=64, k=4), 16, CPU)
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    before = mine.decoder.clone()
    for _ in range(5):
        mine.step(x, 1e-2)
    torch.testing.assert_close(mine.decoder.norm(dim=1), torch.ones(64))
    assert float((mine.decoder - before).abs().max()) > 1e-3


def test_tied_keeps_one_matrix() -> None:
    mine = Learner(TrainConfig(d_sae=64, k=4, tied=True), 16, CPU)
    assert "decoder" not in mine.parameters
    assert mine.decoder is mine.parameters["encoder"]


def test_steps_lower_the_loss() -> None:
    mine = Learner(TrainConfig(d_sae=64, k=4), 16, CPU)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    losses = [float(mine.step(x, 1e-2).loss) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_dead_features_are_counted_in_tokens_and_brought_back() -> None:
    def run(aux_coefficient: float) -> list[int]:
        config = TrainConfig(d_sae=64, k=2, dead_after_tokens=600, aux_coefficient=aux_coefficient)
        mine = Learner(config, 16, CPU)
        mine.parameters["b_enc"][:32] = -3.0
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(200, 16, generator=generator) for _ in range(150)]
        return [mine.step(x, 1e-2).dead for x in rows]

    with_aux, without = run(1 / 32), run(0.0)
    assert with_aux[:3] == without[:3]
    assert with_aux[:2] == [0, 0]  # 400 tokens so far
    assert with_aux[2] >= 20
    # Without the auxiliary loss nothing pulls at a feature that does not fire.
    assert without[-1] >= 20
    assert with_aux[-1] <= 0.75 * without[-1]


def test_threshold_is_the_mean_of_the_smallest_codes() -> None:
    mine = Learner(TrainConfig(d_sae=64, k=2, threshold_decay=0.5), 16, CPU)
    assert mine.mean_threshold is None
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    smallest = []
    for _ in range(3):
        pre = x @ mine.parameters["encoder"].T + mine.parameters["b_enc"]
        smallest.append(float(ops.batch_topk(pre, 2).values.min()))
        mine.step(x, 1e-3)
    expected = (smallest[0] / 4 + smallest[1] / 2 + smallest[2]) / (1 / 4 + 1 / 2 + 1)
    assert mine.mean_threshold == pytest.approx(expected, rel=1e-5)
