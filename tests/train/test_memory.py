"""The memory that a run takes is what is told before it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.ops import best_screen
from r1sae_fast.shards import ActivationWriter
from r1sae_fast.train import TrainConfig
from r1sae_fast.train.memory import expected_memory

D_IN, ROWS, K = 1024, 256, 32
MIB = 1 << 20

PROGRAM = """
import sys
from pathlib import Path
import torch
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, train

def field(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
folder, out, d_sae = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
shards = ActivationShards(folder)
# What libraries take for themselves at first use.
train(shards, out / "small", TrainConfig(64, 8, tokens=2048, batch_size=256), progress=False)
before = field("VmRSS")
config = TrainConfig(d_sae, 32, "topk", tokens=256 * 8, batch_size=256)
train(shards, out / "large", config, progress=False)
print(field("VmHWM") - before)
"""


def config(d_sae: int) -> TrainConfig:
    return TrainConfig(d_sae, K, "topk", tokens=ROWS * 8, batch_size=ROWS)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is told by Linux")
def test_the_peak_is_within_the_formula_at_two_widths(tmp_path: Path) -> None:
    """Weights, gradients and Adam's state of 16 bytes a parameter, and the batch: checkpoint and
    finished SAE included."""
    with ActivationWriter(tmp_path / "rows", D_IN, dtype="bfloat16") as writer:
        writer.write(torch.randn(8 * ROWS, D_IN, generator=torch.Generator().manual_seed(0)))
    peaks, expected = [], []
    for d_sae in (4096, 8192):
        arguments = [tmp_path / "rows", tmp_path / str(d_sae), d_sae]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
        expected.append(expected_memory(config(d_sae), D_IN, stored_bytes=2))
    # glibc keeps up to 64 MiB of what was given back.
    for peak, told in zip(peaks, expected, strict=True):
        assert peak <= 16 * told.parameters + told.batch + 64 * MIB
        assert peak <= told.total + 64 * MIB
    # What both have alike is gone from the difference (found: 13.4 bytes a parameter). One more
    # array as large as a matrix, a gradient that is written out, would be 2 more.
    grown = (peaks[1] - peaks[0]) / (expected[1].parameters - expected[0].parameters)
    assert 8 <= grown <= 16


def test_what_is_told() -> None:
    wide = TrainConfig(28_672, 64, "topk", batch_size=256)
    told = expected_memory(wide, 7168)
    assert told.parameters == 2 * 28_672 * 7168
    assert told.weights + told.moments == 12 * told.parameters
    assert told.total <= 16 * told.parameters + told.batch
    assert "at most" in str(told)
    assert "weights 1.64, moments 3.29" in str(told)
    half = expected_memory(wide, 7168, fired=0.5, dead=0.25)
    assert half.moments == told.moments // 2
    assert half.dead == 8 * 7168 * 7168
    assert half.batch > told.batch
    tied = expected_memory(TrainConfig(28_672, 64, "topk", tied=True, batch_size=256), 7168)
    assert 2 * tied.parameters == told.parameters
    rounded = TrainConfig(28_672, 64, "topk", batch_size=256, compute_dtype="bfloat16")
    skipping = TrainConfig(28_672, 64, "topk", batch_size=256, skip_connection=True)
    transcoder = expected_memory(skipping, 7168, transcodes=True)
    assert transcoder.total - told.total == 16 * 7168**2 + 256 * 7168 * (8 + 16)
    assert expected_memory(rounded, 7168).copies >= 2 * told.parameters
    # Short rows may be screened by a copy of two bytes a weight.
    screens = best_screen()[0] != "none"
    assert expected_memory(wide, 512).copies == screens * 2 * 28_672 * (512 + 128)
    assert expected_memory(wide, 513).copies == screens * 28_672 * (513 + 128)


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path / "rows", 24, dtype="float32") as writer:
        writer.write(torch.randn(100, 24))
    out = tmp_path / "sae"
    result = CliRunner().invoke(
        app, ["train", str(tmp_path / "rows"), str(out), "--dry-run", "--tokens", "5000"]
    )
    assert result.exit_code == 0, result.output
    assert "2 steps of 4,096 rows" in result.output
    assert "memory: at most" in result.output
    assert not out.exists()
