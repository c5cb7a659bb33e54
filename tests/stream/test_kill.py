"""kill -9 at random moments, then once more to the end: the very shards of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1sae_fast.shards import ActivationShards

KILLS = 10


@pytest.mark.slow
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
    found, expected = tmp_path / "killed", tmp_path / "undisturbed"
    names = sorted(path.name for path in expected.iterdir())
    assert len([name for name in names if name.startswith("shard-")]) >= 8
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    ActivationShards(found).verify()
