"""kill -9 at random moments, then once more to the end: the very rows of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1sae_fast.shards import ActivationShards

KILLS = 12


@pytest.mark.skipif(sys.platform == "win32", reason="forks, which Windows does not")
def test_killed_at_random_moments(checkpoint: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed.py")
    run = subprocess.run(
        [sys.executable, str(script), str(checkpoint), str(tmp_path), str(KILLS), "1"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    # The moments are random: most children must have died at work, in different states.
    assert report["killed"] >= KILLS // 2, report
    assert report["states"] >= 3, report
    assert report["sequences"] == 120
    found, expected = (
        ActivationShards(tmp_path / "killed"),
        ActivationShards(tmp_path / "undisturbed"),
    )
    found.verify()
    assert len(found) == len(expected)
    for name in ("activations", "tokens", "sequence_id", "position", "segment"):
        assert torch.equal(getattr(found[:], name), getattr(expected[:], name)), name
    assert not list((tmp_path / "killed").glob("*.tmp"))
