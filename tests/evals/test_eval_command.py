"""``r1sae eval`` and its report: table, JSON, picture, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from r1sae_fast import FastSAE
from r1sae_fast.cli.main import app
from r1sae_fast.errors import CheckpointError
from r1sae_fast.evals import read_report, write_report
from r1sae_fast.evals.picture import points, write_picture
from r1sae_fast.evals.report import entry
from r1sae_fast.shards import ActivationShards

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def saved(folder: Path, d_in: int = 256, k: int = 8) -> Path:
    torch.manual_seed(k)
    sae = FastSAE(d_in, 300, k, mode="topk").requires_grad_(False)
    sae.metadata = {"activations": {"layer": 2}}
    sae.save(folder)
    return folder


@pytest.fixture
def shards(write_rows: Callable[..., ActivationShards]) -> Path:
    # As large as TinyR1's residuals are, so that none of these is an outlier.
    rows = 70 * torch.randn(120, 256, generator=torch.Generator().manual_seed(0))
    return Path(write_rows(rows, torch.arange(120) % 3).folder)


def test_everything_at_once(shards: Path, tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", k=20)
    out, png = tmp_path / "eval.json", tmp_path / "eval.png"
    done = run(
        *(a, b, "--shards", shards, "--model", "tiny-r1", "--tiny-texts", 1, "--problems", 0),
        *("--json", out, "--picture", png),
    )
    assert done.exit_code == 0, done.stderr
    for word in ("FVU", "thinking: FVU", "CE recovered", "dead features", "nearest other"):
        assert word in done.stdout
    report = read_report(out)
    assert report["settings"]["layer"] == 2
    assert report["settings"]["shards_fingerprint"] == ActivationShards(shards).fingerprint
    one, other = report["saes"]
    assert (one["name"], other["name"]) == (str(a), str(b))
    assert (one["reconstruction"]["l0"], other["reconstruction"]["l0"]) == (8.0, 20.0)
    assert one["answers"] is None
    limit = one["in_model"]["norm_limit"]
    assert limit == other["in_model"]["norm_limit"] == one["reconstruction"]["norm_limit"]
    assert png.read_bytes().startswith(PNG)
    # What was measured before can be shown and compared again.
    png.unlink()
    again = run(out, "--picture", png)
    assert again.exit_code == 0, again.stderr
    assert again.stdout == done.stdout
    assert png.read_bytes().startswith(PNG)


def test_on_activations_alone(shards: Path, tmp_path: Path) -> None:
    png = tmp_path / "eval.png"
    done = run(saved(tmp_path / "a"), "--shards", shards, "--similarity", 0, "--picture", png)
    assert done.exit_code == 0, done.stderr
    assert "In the model" not in done.stdout
    assert "Decoder" not in done.stdout
    assert png.read_bytes().startswith(PNG)


def test_bad_input(
    shards: Path, tmp_path: Path, write_rows: Callable[..., ActivationShards]
) -> None:
    sae = saved(tmp_path / "a")
    empty = tmp_path / "empty"
    empty.mkdir()
    uncalibrated = tmp_path / "uncalibrated"
    FastSAE(256, 300, 4, mode="threshold").save(uncalibrated)
    damaged = tmp_path / "other.json"
    damaged.write_text('{"format": "else"}')
    no_rows = write_rows(torch.ones(0, 256)).folder
    for arguments, message in (
        ([sae], "nothing to evaluate on: give --shards"),
        ([sae, "--shards", shards, "--layer", 1], "--problems need --model"),
        ([empty, "--shards", shards], "has no sae.safetensors"),
        ([tmp_path / "nowhere", "--shards", shards], "nowhere does not exist"),
        ([saved(tmp_path / "narrow", 255), "--shards", shards], "have d_in = 256, the SAE 255"),
        ([uncalibrated, "--shards", shards], "uncalibrated: mode is 'threshold', but"),
        ([sae, "--shards", shards, "--mode", "best"], "mode is 'best'; expected one of topk"),
        ([sae, "--shards", no_rows], "no rows to evaluate on"),
        ([sae, "--shards", shards, "--json", tmp_path / "no" / "e.json"], "no such folder"),
        ([damaged], "no report; expected"),
        ([uncalibrated, "--model", "tiny-r1"], "do not tell one layer"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1, arguments
        assert message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_reports_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    sae = FastSAE(4, 8, 2)
    write_report(path, [entry("a", sae)], {"norm_limit": math.inf})
    assert read_report(path)["settings"] == {"norm_limit": None}
    assert read_report(path)["saes"][0]["reconstruction"] is None
    whole = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"format": None}, "no report"),
        ({"saes": [{"name": 3}]}, "damaged"),
        ({"saes": None}, "damaged"),
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(CheckpointError, match=message):
            read_report(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_report(path)
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "none.json")


def test_a_picture_needs_figures(tmp_path: Path) -> None:
    nothing = entry("a", FastSAE(4, 8, 2))
    with pytest.raises(ValueError, match="nothing to draw"):
        write_picture([nothing], tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []
    known = {**nothing, "in_model": {"l0": 2.0, "fvu": 0.5, "ce_recovered_zero": None}}
    assert points([nothing, known], "in_model", "fvu") == [(known, 2.0, 0.5)]
    assert points([known], "in_model", "ce_recovered_zero") == []
    write_picture([known], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
