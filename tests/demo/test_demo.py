"""The demo end to end on a small scale: run, run again, killed and resumed, refused."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from r1sae_fast import FastSAE
from r1sae_fast.demo import SCALES, DemoSettings, run_demo
from r1sae_fast.demo.findings import Findings
from r1sae_fast.features import FeatureDB
from r1sae_fast.shards import ActivationShards, CodeShards
from r1sae_fast.tiny_r1.recipe import Recipe, Training

STAGES = ["reason", "harvest", "train", "encode", "examples", "features", "report"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of TinyR1's shape with weights that nothing has trained: what it writes is noise."""
    from r1sae_fast.tiny_r1.export import export

    folder = tmp_path_factory.mktemp("model")
    export(Training(Recipe(seed=1, steps=1), folder), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def settings(model: Path) -> DemoSettings:
    return replace(
        SCALES["test"],
        model=str(model),
        own_traces=2,
        corpus_tokens=2500,
        test_traces=40,
        slip_rate=0.5,
        d_sae=64,
        k=4,
        train_tokens=20_000,
    )


def run(folder: Path, settings: DemoSettings, width: int = 100) -> tuple[Findings, str]:
    output = StringIO()
    findings = run_demo(folder, settings, console=Console(file=output, width=width))
    return findings, output.getvalue()


def finished(folder: Path) -> list[str]:
    return list(json.loads((folder / "demo.json").read_text())["finished"])


def test_all_of_it_and_again(settings: DemoSettings, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    findings, output = run(folder, settings)
    assert finished(folder) == STAGES
    # What lies there is what each part of the library opens.
    sae = FastSAE.load(folder / "sae")
    shards, codes = ActivationShards(folder / "activations"), CodeShards(folder / "codes")
    assert len(shards) == len(codes) >= 2500
    assert (sae.d_in, sae.d_sae) == (shards.d_in, codes.d_sae)
    with FeatureDB(folder / "features.ddb") as db:
        assert db.d_sae == 64
        assert int(db.metadata["rows"]) == len(codes)
    # What is said is what was found.
    assert 0 < findings.sae["fvu"] < 1
    assert f"{findings.sae['fvu']:.4f}" in output
    assert [one.moment for one in findings.detectors] == ["result", "check", "compare", "verdict"]
    for one in (*findings.features, *findings.detector_features):
        assert f"#{one.feature}" in output
        assert f"#{one.feature}" in (folder / "report.md").read_text()
    assert findings.trace is not None
    assert not findings.trace.own  # noise slips in no way that can be judged
    assert {"wrong", "wait"} <= {piece.mark for piece in findings.trace.pieces}
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))
    assert all(len(line) <= 100 for line in output.splitlines())

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again, output = run(folder, settings, width=80)
    assert again == findings
    # The narrowest usual terminal: nothing is cut off.
    assert all(cell_len(line) <= 80 for line in output.splitlines())
    assert "…" not in output
    assert output.count("done before") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_what_is_missing_is_done(settings: DemoSettings, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first, _ = run(folder, settings)
    state = json.loads((folder / "demo.json").read_text())
    for stage in ("features", "report"):
        del state["finished"][stage]
    (folder / "demo.json").write_text(json.dumps(state))
    second, output = run(folder, settings)
    assert output.count("done before") == len(STAGES) - 2
    assert second == first


PROGRAM = """
import json, sys
from rich.cells import cell_len
from rich.console import Console
from r1sae_fast.demo import DemoSettings, run_demo
run_demo(sys.argv[1], DemoSettings(**json.loads(sys.argv[2])), console=Console(quiet=True))
"""


@pytest.mark.slow
def test_a_demo_killed_at_random_moments(settings: DemoSettings, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(settings.to_dict())]
    rng = random.Random(0)
    kills = 0
    # Each life ends soon after it has finished something, or written something new.
    for pattern in ("traces.jsonl", "activations/shard-*", "sae/metrics.jsonl", "features.ddb*"):
        with subprocess.Popen(command) as process:
            while process.poll() is None and not list(folder.glob(pattern)):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    resumed, _ = run(folder, settings)
    undisturbed, _ = run(tmp_path / "undisturbed", settings)
    assert resumed == undisturbed
    assert not list(folder.rglob("*.tmp"))


# -- bad input ------------------------------------------------------------------------------------


def test_other_settings_are_refused(settings: DemoSettings, tmp_path: Path) -> None:
    from r1sae_fast.demo.state import State

    (tmp_path / "demo").mkdir()
    State(tmp_path / "demo", {"d_sae": 64, "k": 4})
    with pytest.raises(ValueError, match="begun with d_sae = 64, not 65"):
        State(tmp_path / "demo", {"d_sae": 65, "k": 4})


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    from r1sae_fast.demo.state import State

    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(ValueError, match=r"demo\.json: not a demo's state"):
        State(tmp_path, {})


def test_a_folder_of_other_things_is_refused(settings: DemoSettings, tmp_path: Path) -> None:
    (tmp_path / "chapter.tex").write_text("...")
    with pytest.raises(FileExistsError, match=r"chapter\.tex"):
        run(tmp_path, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["chapter.tex"]


def test_no_such_model(settings: DemoSettings, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-model"):
        run(tmp_path / "demo", replace(settings, model=str(tmp_path / "no-model")))
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer", 99), ("layer", -1), ("k", 0), ("k", 65), ("own_traces", 0), ("slip_rate", 1.0)],
)
def test_bad_settings_leave_no_trace(
    settings: DemoSettings, tmp_path: Path, name: str, value: float
) -> None:
    """Nothing is written, so that the same folder serves once the setting is mended."""
    with pytest.raises(ValueError, match=rf"\b{name} is {value}"):
        run(tmp_path / "demo", replace(settings, **{name: value}))
    assert not (tmp_path / "demo").exists()
