"""What ranks train from, and what they do besides: pairs, engines, sweeps, resampling."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from r1sae_fast import FastSAE
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import ActivationShards, ActivationWriter, PairedShards
from r1sae_fast.train import EngineRows, TrainConfig, sweep_configs, train, train_sweep
from r1sae_fast.train.step import Learner

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

# A run of each layout into a folder of its own; where `stop` is set, all ranks stop there.
PROGRAM = r"""
import sys
from pathlib import Path
import torch
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import ActivationShards, PairedShards
from r1sae_fast.train import EngineRows, TrainConfig, sweep_configs
from r1sae_fast.train.parallel.run import sweep_in_parallel, train_in_parallel

kind, source, out, config, layouts, stop = [eval(text) for text in arguments]

class StoppedError(Exception):
    pass

def opened():
    if kind == "engine":
        engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32, last_layer=0)
        return EngineRows(engine, source, 0, buffer_rows=128, batch_size=3)
    return PairedShards(*source) if kind == "pairs" else ActivationShards(source)

def work(layout, rank, known):
    name = f"{layout.data}x{layout.latents}"
    def halt(line):
        if stop and line.step >= stop:
            raise StoppedError
    how = dict(log_every=2, checkpoint_seconds=0, progress=False)
    for again in range(2 if stop else 1):
        try:
            if kind == "sweep":
                results = sweep_in_parallel(
                    opened(), Path(out) / name, sweep_configs(config, {"k": [2, 4]}), layout, **how)
                assert [one.sae is None for one in results] == [rank > 0] * 2
                continue
            # The second time the run goes on to its end.
            train_in_parallel(opened(), Path(out) / name, config, layout, **how,
                              on_metrics=None if again else halt)
            assert again or not stop
        except StoppedError:
            pass
"""


def call(
    run_ranks: RunRanks, kind: str, source: Any, out: Path, config: TrainConfig,
    layouts: list[tuple[int, int]], stop: int = 0,
) -> None:  # fmt: skip
    told = map(repr, (kind, source, str(out), config, layouts, stop))
    result = run_ranks(PROGRAM, *told)
    assert result.returncode == 0, result.stderr


def require_close(one: Path, many: Path, room: float = 0.05) -> None:
    """The order of sums may move a last bit, and that a code over its edge: a few features."""
    expected, found = FastSAE.load(one), FastSAE.load(many)
    assert expected.config == found.config
    for name, tensor in expected.state_dict().items():
        other = found.state_dict()[name]
        assert (other - tensor).norm() <= room * tensor.norm() + 1e-3, name
    steps = [
        [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, many)
    ]
    assert steps[0] == steps[1]
    assert not list(many.glob("*.tmp"))


CONFIG = TrainConfig(
    d_sae=45, k=3, tokens=20 * 50, batch_size=50, learning_rate=1e-3, dead_after_tokens=400
)
LAYOUTS = [(2, 2)]


def test_dead_features_are_reset_as_in_one_process(
    acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks
) -> None:
    config = TrainConfig(
        **{**CONFIG.to_dict(), "k": 1, "aux_coefficient": 0.0, "resample_every": 400}
        | {"dead_after_tokens": 150}
    )
    train(acts, tmp_path / "one", config, log_every=2, progress=False)
    # Some were dead then.
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["dead_fraction"] for line in lines) > 0.1
    call(run_ranks, "shards", str(acts.folder), tmp_path, config, LAYOUTS)
    for data, latents in LAYOUTS:
        # A last bit may also draw another row for a feature: two such of 45 are 0.3 of the norm,
        # five features that were not reset (see above) 0.47.
        require_close(tmp_path / "one", tmp_path / f"{data}x{latents}", room=0.3)


def test_a_transcoder(acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks) -> None:
    batch = acts[:]
    matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    with ActivationWriter(tmp_path / "targets", 24, dtype="float32") as writer:
        writer.write(
            batch.activations @ matrix, sequence_id=batch.sequence_id, position=batch.position
        )
    folders = (str(acts.folder), str(tmp_path / "targets"))
    config = TrainConfig(**{**CONFIG.to_dict(), "skip_connection": True})
    train(PairedShards(*folders), tmp_path / "one", config, log_every=2, progress=False)
    call(run_ranks, "pairs", folders, tmp_path, config, LAYOUTS)
    for data, latents in LAYOUTS:
        require_close(tmp_path / "one", tmp_path / f"{data}x{latents}")


def test_a_sweep(acts: ActivationShards, tmp_path: Path, run_ranks: RunRanks) -> None:
    train_sweep(
        acts, tmp_path / "one", sweep_configs(CONFIG, {"k": [2, 4]}), log_every=2, progress=False
    )
    call(run_ranks, "sweep", str(acts.folder), tmp_path, CONFIG, [(1, 2)])
    for name in ("k=2", "k=4"):
        require_close(tmp_path / "one" / name, tmp_path / "1x2" / name)


def test_rows_of_an_engine_that_all_ranks_run(tmp_path: Path, run_ranks: RunRanks) -> None:
    """By data alone, where all products are the same, down to the bit; and after a stop."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{a} plus {b} is {a + b}\n" for a in range(9) for b in range(9)))
    config = TrainConfig(**{**CONFIG.to_dict(), "tokens": 600})
    engine = LocalEngine.from_pretrained("tiny-r1", dtype=torch.float32, last_layer=0)
    rows = EngineRows(engine, texts, 0, buffer_rows=128, batch_size=3)
    train(rows, tmp_path / "one", config, log_every=2, progress=False)
    call(run_ranks, "engine", str(texts), tmp_path, config, [(2, 1), (1, 3)], stop=5)
    require_close(tmp_path / "one", tmp_path / "2x1")
    require_close(tmp_path / "one", tmp_path / "1x3")
    assert len(list((tmp_path / "2x1").glob("buffer-*"))) == 1


def test_learners_of_a_rank_alone_are_the_same(acts: ActivationShards) -> None:
    """The first weights of a transcoder's decoder don't depend on who has which features."""
    config = TrainConfig(d_sae=3000, k=3)
    whole = Learner(config, 24, torch.device("cpu"), transcodes=True)
    assert not torch.equal(whole.parameters["encoder"], whole.decoder)

    class Second:
        """The second of two halves."""

        def own(self, d_sae: int) -> tuple[int, int]:
            return d_sae // 2, d_sae

    half = Learner(config, 24, torch.device("cpu"), transcodes=True, ranks=Second())  # type: ignore[arg-type]  # all that is asked
    assert torch.equal(half.decoder, whole.decoder[1500:])
