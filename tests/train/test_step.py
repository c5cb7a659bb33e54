"""A step's hand-written gradients against autograd on the dense definition."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast import SparseCodes, ops
from r1sae_fast.optim import FactoredGradient
from r1sae_fast.optim.update import settle
from r1sae_fast.train import TrainConfig, by_kernels, factored
from r1sae_fast.train import gradients as dense
from r1sae_fast.train.gradients import Auxiliary, Weights
from r1sae_fast.train.losses import Part
from r1sae_fast.train.step import Learner

CPU = torch.device("cpu")


WAYS = {
    "torch": {"in_factors": False, "by_kernels": False},
    "kernels": {"in_factors": False, "by_kernels": True},
    "factors": {"in_factors": True},
}


def learner(d_in: int, seed: int, *, way: str = "factors", **settings: object) -> Learner:
    """A learner with random weights, so that nothing cancels by the initialisation's symmetry."""
    config = TrainConfig(**settings)  # type: ignore[arg-type]  # from tests
    result = Learner(config, d_in, CPU, **WAYS[way])
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


def written_out(gradient: Tensor | FactoredGradient) -> Tensor:
    return gradient.to_dense() if isinstance(gradient, FactoredGradient) else gradient


@pytest.mark.parametrize("way", WAYS)
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
    way: str, mode: str, tied: bool, rows: int, d_in: int, d_sae: int, k: int, dead: int,
    seed: int,
) -> None:  # fmt: skip
    mine = learner(
        d_in, seed, d_sae=d_sae, k=k, mode=mode, tied=tied, aux_coefficient=0.5, aux_k=2,
        dead_after_tokens=1000, way=way,
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
        found_here = written_out(gradient)
        torch.testing.assert_close(found_here, expected[name], rtol=1e-4, atol=1e-5 * size + 1e-9)


@pytest.mark.parametrize("backend", [dense, by_kernels, factored])
@pytest.mark.parametrize("with_dead", [False, True])
def test_rows_without_codes(backend: ModuleType, with_dead: bool) -> None:
    codes = SparseCodes.from_dense(torch.zeros(3, 5))
    assert torch.equal(dense.decode(codes, torch.ones(5, 2)), torch.zeros(3, 2))
    weights = Weights(-torch.ones(5, 2), torch.ones(5, 2), torch.zeros(5))
    auxiliary = Auxiliary(torch.arange(5), 2, 1.0) if with_dead else None
    x, error = torch.ones(3, 2), torch.ones(3, 2)
    found, loss = backend.gradients([Part(codes, error)], x, weights, error, 1.0, auxiliary)
    for gradient in (found.encoder, found.decoder, found.b_enc):
        assert not written_out(gradient).any()
    # Nothing is explained of the leftover.
    assert float(loss) == (1.0 if with_dead else 0.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dead_features_by_products_or_by_codes(
    monkeypatch: pytest.MonkeyPatch, tied: bool, share: float
) -> None:
    """Whichever way they are summed, and however few at a time."""
    monkeypatch.setattr(factored, "_DENSE_SHARE", share)
    monkeypatch.setattr("r1sae_fast.optim.factored._BLOCK_NUMBERS", 63 * 5)
    settings = {"d_sae": 123, "k": 3, "tied": tied, "dead_after_tokens": 9, "aux_k": 20}
    steps = [learner(63, 4, way=way, **settings) for way in ("factors", "torch")]
    dead = torch.arange(7, 100, 2)
    x = torch.randn(70, 63, generator=torch.Generator().manual_seed(1))
    for step in steps:
        step.parameters["b_enc"][dead] = -3.0
        step.unfired_tokens[dead] = 9
        assert step.step(x, 1e-2).dead > 20
    for name, expected in steps[1].parameters.items():
        torch.testing.assert_close(steps[0].parameters[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["factors", "kernels"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
@pytest.mark.parametrize("mode", ["batch_topk", "topk"])
def test_steps_are_those_of_torchs_adam_on_dense_gradients(
    way: str, tied: bool, clip: float, mode: str
) -> None:
    settings = {"d_sae": 123, "k": 2, "mode": mode, "tied": tied, "gradient_clip": clip}
    settings |= {"dead_after_tokens": 300, "aux_k": 7}
    mine, truth = (learner(63, 3, way=mine, **settings) for mine in (way, "torch"))
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        x = torch.randn(70, 63, generator=generator)
        before = {name: tensor.clone() for name, tensor in truth.tensors().items()}
        mine.load_tensors(before)
        figures, expected = mine.step(x, 1e-2), truth.step(x, 1e-2)
        assert figures.dead == expected.dead
        torch.testing.assert_close(figures.loss, expected.loss)
        for state in mine.adam_state.values():
            settle(state, mine.config.betas)
        for name, tensor in truth.tensors().items():
            found = mine.tensors()[name]
            # Where a gradient is almost 0 Adam's first steps amplify its rounding.
            size = 1e-2 if name in mine.parameters else float(tensor.abs().max())
            wrong = (found - tensor).abs() > 1e-4 * tensor.abs() + 1e-3 * size
            assert float(wrong.float().mean()) < (0.02 if number < 2 else 0.01), name


def test_sparse_adam_leaves_features_without_codes_alone() -> None:
    mine = learner(16, 0, d_sae=64, k=2, adam="sparse", aux_coefficient=0.0)
    generator = torch.Generator().manual_seed(0)
    mine.step(torch.randn(40, 16, generator=generator), 1e-2)
    before = {name: tensor.clone() for name, tensor in mine.tensors().items()}
    x = torch.randn(5, 16, generator=generator)
    fired = mine.screen.batch_topk(x, 2).indices.unique().long()
    quiet = torch.ones(64, dtype=torch.bool)
    quiet[fired] = False
    mine.step(x, 1e-2)
    for name in ("encoder", "decoder"):
        for part in (name, f"adam.{name}.exp_avg", f"adam.{name}.exp_avg_sq"):
            assert torch.equal(mine.tensors()[part][quiet], before[part][quiet])
            assert not torch.equal(mine.tensors()[part][fired], before[part][fired])


def test_sparse_adam_is_refused_where_it_can_t_be() -> None:
    with pytest.raises(ValueError, match='adam is "sparse" on cpu'):
        learner(16, 0, way="torch", d_sae=64, k=2, adam="sparse")


def test_features_fall_asleep_beside_those_of_matrix_products() -> None:
    """A feature that never moved sleeps (see the Rust core)."""
    mine = learner(8, 0, d_sae=16, k=4, aux_coefficient=0.0)
    mine.parameters["b_enc"][:4] = -1e3
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        found = mine.gradients(torch.randn(20, 8, generator=generator))[1]["encoder"]
        assert isinstance(found, FactoredGradient)
        assert found.products
        mine.step(torch.randn(20, 8, generator=generator), 1e-2)
    assert bool((mine.adam_state["encoder"]["asleep"][:4] > 0).all())


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


@pytest.mark.parametrize("mode", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_the_first_encoder_is_of_the_size_that_explains_most(mode: str, steps: int) -> None:
    config = TrainConfig(d_sae=64, k=4, mode=mode, tokens=steps, batch_size=1)
    mine = Learner(config, 16, CPU)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=generator) * torch.rand(500, 1, generator=generator)
    mine.start(x)
    torch.testing.assert_close(mine.decoder.norm(dim=1), torch.ones(64))
    encoder = mine.parameters["encoder"]
    size = encoder.norm(dim=1)
    torch.testing.assert_close(size, size[:1].expand(64))
    torch.testing.assert_close(encoder / size[:, None], mine.decoder)
    # Of all sizes: the error is then orthogonal to what the codes make.
    rule = "batch_topk" if mode != "topk" and steps < 400 else "topk"
    made = selected(x @ encoder.T, 4, rule) @ mine.decoder
    assert abs(float(((x - made) * made).sum() / made.square().sum())) < 1e-4


def test_the_first_encoder_of_tied_ones_and_of_rows_that_say_nothing() -> None:
    for config in (TrainConfig(64, 4, tied=True), TrainConfig(64, 4)):
        mine = Learner(config, 16, CPU)
        mine.start(torch.randn(50, 16) if config.tied else torch.zeros(50, 16))
        torch.testing.assert_close(mine.parameters["encoder"].norm(dim=1), torch.ones(64))


def test_steps_row_by_row_are_those_of_topk() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 16, generator=generator) * torch.rand(90, 1, generator=generator)
    of_rows, shared, topk = (
        learner(16, 0, d_sae=64, k=4, mode=mode) for mode in ("batch_topk", "batch_topk", "topk")
    )
    of_rows.step(x, 1e-2, row_by_row=True)
    shared.step(x, 1e-2)
    topk.step(x, 1e-2)
    for name, tensor in topk.parameters.items():
        assert torch.equal(tensor, of_rows.parameters[name]), name
        assert not torch.equal(tensor, shared.parameters[name]), name


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
    assert with_aux[2] >= 10
    # Without the auxiliary loss nothing pulls at a feature that does not fire.
    assert without[-1] >= 10
    assert with_aux[-1] <= 0.9 * without[-1]


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
