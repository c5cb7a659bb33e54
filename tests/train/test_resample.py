"""Dead features get the directions of badly explained rows; such a run goes on to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import Metrics, TrainConfig, train
from r1sae_fast.train.resample import resample
from r1sae_fast.train.step import Learner

CONFIG = TrainConfig(
    d_sae=256, k=2, tokens=10_000, batch_size=500, learning_rate=1e-2, dead_after_tokens=1500,
    aux_coefficient=0.0, resample_every=5000,
)  # fmt: skip


@pytest.mark.parametrize("mode", ["batch_topk", "jumprelu"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("in_factors", [True, False])
def test_what_is_reset(
    make_rows: Callable[[int], Tensor], mode: str, tied: bool, in_factors: bool
) -> None:
    config = replace(CONFIG, d_sae=64, mode=mode, tied=tied)
    learner = Learner(config, 24, torch.device("cpu"), in_factors=in_factors)
    x = make_rows(400) - 3.0
    for _ in range(3):
        learner.step(x, 1e-3)
    dead = torch.tensor([3, 17, 40])
    learner.unfired_tokens.clamp_(max=10)
    learner.unfired_tokens[dead] = 2000
    before = {name: tensor.clone() for name, tensor in learner.parameters.items()}
    with torch.no_grad():
        assert resample(learner, x, 1) == 3
        assert resample(learner, x, 2) == 0
    others = torch.ones(64, dtype=torch.bool)
    others[dead] = False
    for name, tensor in learner.parameters.items():
        if name != "b_dec":
            assert torch.equal(tensor[others], before[name][others]), name
    alive = before["encoder"][others].norm(dim=1).mean()
    size = learner.parameters["encoder"][dead].norm(dim=1)
    torch.testing.assert_close(size, (0.2 * alive).expand(3))
    # Each is the direction of a row.
    directions = torch.nn.functional.normalize(x - learner.parameters["b_dec"], dim=1)
    likeness = torch.nn.functional.normalize(learner.parameters["encoder"][dead], dim=1)
    assert float((likeness @ directions.T).amax(1).min()) > 0.99999
    assert not bool(learner.parameters["b_enc"][dead].any())
    for name, state in learner.adam_state.items():
        if name != "b_dec":
            assert not bool(state["exp_avg"][dead].any())
            assert bool(state["exp_avg"][others].any())
    assert learner.unfired_tokens[dead].tolist() == [0, 0, 0]
    # The screen knows of the new weights.
    pre = x @ learner.parameters["encoder"].T + learner.parameters["b_enc"]
    found = learner.sae().find.topk(x, 64, check_finite=False).to_dense()
    torch.testing.assert_close(found, pre.relu(), rtol=1e-5, atol=1e-5)


def test_a_run_with_resampling_goes_on_to_the_bit(shards: ActivationShards, tmp_path: Path) -> None:
    seen: list[Metrics] = []
    whole = train(
        shards, tmp_path / "a", CONFIG, progress=False, log_every=1, on_metrics=seen.append
    )
    dead = {line.step: line.dead_fraction for line in seen}
    assert dead[10] > 0.0
    assert dead[11] < dead[10]  # 5000 rows, and those that were dead have been silent for 500

    def stop(line: Metrics) -> None:
        if line.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            shards, tmp_path / "b", CONFIG, progress=False, log_every=1, checkpoint_seconds=0,
            on_metrics=stop,
        )  # fmt: skip
    resumed = train(shards, tmp_path / "b", CONFIG, progress=False, log_every=1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
