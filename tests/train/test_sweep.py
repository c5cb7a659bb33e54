"""train_sweep(): each SAE is the one that its own run makes, to the bit."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import EngineRows, TrainConfig, sweep_configs, train, train_sweep
from r1sae_fast.train.step import Learner

BASE = TrainConfig(
    d_sae=64, k=2, tokens=10_000, batch_size=500, learning_rate=1e-2, dead_after_tokens=4000
)
GRID = {
    "two": {"k": 2, "seed": 0},
    "wide": {"d_sae": 96, "k": 3, "seed": 1},
    "topk": {"mode": "topk", "learning_rate": 3e-3, "tied": True},
    "nested": {"mode": "matryoshka"},
    "jump": {"mode": "jumprelu"},
    "relu": {"mode": "relu", "k": None},
}
CONFIGS = {name: replace(BASE, data_seed=0, **changes) for name, changes in GRID.items()}


def assert_same(found: Path, expected: Path) -> None:
    mine, other = (FastSAE.load(folder).state_dict() for folder in (found, expected))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), (found.name, name)


def test_each_is_as_by_itself(shards: ActivationShards, tmp_path: Path) -> None:
    seen: list[str] = []
    found = train_sweep(
        shards,
        tmp_path / "sweep",
        CONFIGS,
        progress=False,
        log_every=7,
        on_metrics=lambda name, line: seen.append(name),
    )
    assert [result.name for result in found] == list(CONFIGS)
    assert seen[: len(CONFIGS)] == list(CONFIGS)
    for result in found:
        train(shards, tmp_path / result.name, CONFIGS[result.name], progress=False, log_every=7)
        assert_same(result.folder, tmp_path / result.name)
        assert result.error is None
        assert (result.folder / "metrics.jsonl").exists()
    # The lone run's folder is finished, and so is the sweep's.
    again = train_sweep(shards, tmp_path / "sweep", CONFIGS, progress=False)
    for result, before in zip(again, found, strict=True):
        assert result.sae is not None
        assert before.sae is not None
        assert torch.equal(result.sae.W_dec, before.sae.W_dec)


def test_from_an_engine_with_one_forward(tmp_path: Path) -> None:
    engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32, last_layer=1)
    prompts = [f"{a} plus {b}" for a in range(8) for b in range(12)]

    def rows() -> EngineRows:
        return EngineRows(engine, prompts, 1, buffer_rows=300, batch_size=8)

    base = replace(BASE, tokens=1500, batch_size=100, data_seed=0)
    configs = {
        "a": base, "jump": replace(base, mode="jumprelu"), "b": replace(base, seed=1)
    }  # fmt: skip
    forwards = 0
    plain = engine.residuals

    def counted(*given: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return plain(*given)  # type: ignore[arg-type]  # as they came

    engine.residuals = counted  # type: ignore[method-assign, assignment]  # passes all on
    train(rows(), tmp_path / "a", configs["a"], progress=False)
    alone, forwards = forwards, 0
    train_sweep(rows(), tmp_path / "sweep", configs, progress=False)
    assert forwards == alone
    assert_same(tmp_path / "sweep" / "a", tmp_path / "a")
    for name in ("jump", "b"):
        train(rows(), tmp_path / name, configs[name], progress=False)
        assert_same(tmp_path / "sweep" / name, tmp_path / name)
    buffers = [path.stat().st_ino for path in (tmp_path / "sweep").glob("*/buffer-*")]
    assert len(buffers) == 3
    assert len(set(buffers)) == 1


PROGRAM = r"""
import os, signal, sys
from dataclasses import replace
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train_sweep
base = TrainConfig(d_sae=64, k=2, tokens=10_000, batch_size=500, learning_rate=1e-2, data_seed=0)
configs = {"a": base, "b": replace(base, seed=1), "c": replace(base, k=3)}
shards = ActivationShards(sys.argv[1])
for lines, signal_number in zip(sys.argv[3::2], sys.argv[4::2]):
    child = os.fork()
    if child == 0:
        seen = 0
        def count(name, line):
            global seen
            seen += 1
            if seen == int(lines):
                os.kill(os.getpid(), int(signal_number))
        train_sweep(shards, sys.argv[2], configs, log_every=3, checkpoint_seconds=0,
                    progress=False, on_metrics=count)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_between_the_checkpoints_of_its_members(
    shards: ActivationShards, tmp_path: Path
) -> None:
    def run(folder: str, *kills: tuple[int, int]) -> list[int]:
        words = [str(number) for kill in kills for number in kill]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(shards.folder), str(tmp_path / folder), *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return [int(word) for word in done.stdout.split()]

    # A member's line comes before its checkpoint, so a kill in the line of the second or third
    # leaves members at different steps.
    kills = [(2, 9), (6, 9), (2, 9), (3, 9), (4, 15), (0, 9)]
    statuses = run("killed", *kills)
    assert statuses[:4] == [-signal.SIGKILL] * 4
    assert statuses[4:] == [128 + signal.SIGTERM, 0]
    assert run("undisturbed", (0, 9)) == [0]
    for name in "abc":
        assert_same(tmp_path / "killed" / name, tmp_path / "undisturbed" / name)


def test_one_that_diverges_ends_alone(
    shards: ActivationShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.step

    def poisoned(
        self: Learner, x: Tensor, rate: float, share: float, target: None, *, row_by_row: bool
    ) -> object:
        if self.config.seed == 1 and self.unfired_tokens.max() >= 0 and poison:
            self.parameters["b_dec"][0] = float("nan")
        return step(self, x, rate, share, target, row_by_row=row_by_row)

    poison = True
    monkeypatch.setattr(Learner, "step", poisoned)
    configs = {"good": replace(BASE, data_seed=0), "bad": replace(BASE, data_seed=0, seed=1)}
    good, bad = train_sweep(shards, tmp_path / "sweep", configs, progress=False, log_every=5)
    assert bad.sae is None
    assert bad.error is not None
    assert "not finite at step 1, which took rows " in bad.error
    assert good.sae is not None
    poison = False
    train(shards, tmp_path / "good", configs["good"], progress=False, log_every=5)
    assert_same(good.folder, tmp_path / "good")
    # It is not tried again.
    again = train_sweep(shards, tmp_path / "sweep", configs, progress=False)
    assert [result.error for result in again] == [None, bad.error]


def test_a_grid() -> None:
    found = sweep_configs(BASE, {"k": [2, 4], "seed": [0, 1]})
    assert list(found) == ["k=2,seed=0", "k=2,seed=1", "k=4,seed=0", "k=4,seed=1"]
    assert {config.data_seed for config in found.values()} == {0}
    assert found["k=4,seed=1"] == replace(BASE, k=4, seed=1, data_seed=0)
    widths = sweep_configs(replace(BASE, mode="matryoshka"), {"matryoshka_widths": [[8, 64]]})
    assert list(widths) == ["matryoshka_widths=8-64"]


@pytest.mark.parametrize(
    ("grid", "error", "words"),
    [
        ({"kk": [2]}, ValueError, "unknown key 'kk' in the sweep; did you mean 'k'"),
        ({"tokens": [2]}, ValueError, "tokens is in the sweep, but its SAEs share one pass"),
        ({"k": 3}, TypeError, "k of the sweep is 3; expected a list"),
        ({"k": []}, ValueError, "k of the sweep has no values"),
        ({"k": [3, 3]}, ValueError, "k=3 is twice in the sweep"),
        ({"k": [65]}, ValueError, "k=65: k is 65, more than d_sae = 64"),
    ],
)
def test_bad_grids(grid: dict[str, list[int]], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sweep_configs(BASE, grid)


def test_bad_sweeps(
    shards: ActivationShards, tmp_path: Path, make_rows: Callable[[int], Tensor]
) -> None:
    for configs, words in (
        ({}, "a sweep of no SAEs"),
        ({"a/b": BASE}, "is called 'a/b'; expected a folder's name"),
        ({"a": BASE, "b": replace(BASE, tokens=1)}, "b has tokens 1, a 10000"),
        ({"a": BASE, "b": replace(BASE, seed=1)}, r"b has data_seed \(or seed\) 1, a 0"),
    ):
        with pytest.raises(ValueError, match=words):
            train_sweep(shards, tmp_path / "sweep", configs, progress=False)
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give a folder for the SAEs"):
        train_sweep(shards, tmp_path / "file", {"a": BASE}, progress=False)
