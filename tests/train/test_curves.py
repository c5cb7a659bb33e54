"""draw_curves(): a picture of what the metrics say, while a run goes on and after."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, draw_curves, train
from r1sae_fast.train.curves import _names


def test_runs_over_each_other(shards: ActivationShards, tmp_path: Path) -> None:
    for k in (2, 4):
        config = TrainConfig(d_sae=64, k=k, tokens=20_000, batch_size=500, learning_rate=1e-2)
        train(shards, tmp_path / f"k{k}", config, progress=False)
    draw_curves([tmp_path / "k2", tmp_path / "k4"], tmp_path / "both.png")
    draw_curves([tmp_path / "k2"], tmp_path / "one.png")
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "one.png") as one:
        assert both.size == one.size
        assert both.tobytes() != one.tobytes()
        # The second run's colour is in the picture of both alone.
        orange = (255, 127, 14)
        assert orange in {colour[:3] for _, colour in both.getcolors(2**24)}
        assert orange not in {colour[:3] for _, colour in one.getcolors(2**24)}
    run = CliRunner().invoke(
        app, ["curves", str(tmp_path / "k2"), "--out", str(tmp_path / "c.png")]
    )
    assert run.exit_code == 0, run.output
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no line of metrics"):
        draw_curves([tmp_path], tmp_path / "curves.png")
    line = {"step": 1, "tokens": 10, "fvu": None, "l0": 2.0, "dead_fraction": 0.0}
    whole = json.dumps(line | {"aux_loss": 0.0, "learning_rate": 1e-3, "tokens_per_second": 9.0})
    (tmp_path / "metrics.jsonl").write_text(f'{whole}\n{{"step": 2, "tok')
    draw_curves([tmp_path], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no runs"):
        draw_curves([], tmp_path / "curves.png")


def test_names_are_what_differs() -> None:
    assert _names([Path("/a/b/x/sae"), Path("/a/b/y/sae")]) == ["x/sae", "y/sae"]
    assert _names([Path("/a/sae")]) == ["sae"]
    assert _names([Path("/a/b"), Path("/a/b/c")]) == ["b", "c"]
    assert _names([Path("/a/b"), Path("/a/b")]) == ["1: b", "2: b"]
