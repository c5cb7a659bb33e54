"""What every launcher would launch compiles for every architecture, fits, and is as claimed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1sae_fast.triton_kernels.aot import ttir_faults
from r1sae_fast.triton_kernels.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], cache: Path) -> str:
    """Another process, since this one interprets kernels; what it prints."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=list(TARGETS))
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The table of one target."""
    out = tmp_path_factory.mktemp("aot") / "table.json"
    script = str(ROOT / "benches" / "triton_kernels" / "aot.py")
    command = [script, "--target", request.param, "--json", str(out)]
    run(command, tmp_path_factory.mktemp("cache"))
    table = json.loads(out.read_text())
    assert table
    return table


@pytest.mark.slow
def test_every_case_compiles_fits_and_is_as_claimed(rows: list[dict]) -> None:
    faults = []
    for row in rows:
        where = f"{row['target']} {row['family']} ({row['case']}) {row['kernel']}"
        limit = TARGETS[row["target"]].shared_memory
        if row["spills"]:
            faults.append(f"{where}: spills {row['spills']} bytes")
        if row["shared_memory"] > limit:
            faults.append(f"{where}: {row['shared_memory']} bytes of shared memory of {limit}")
        faults += [f"{where}: no {name}" for name in row["wants"] if not row["found"].get(name)]
        faults += [f"{where}: {text}" for text in row["warnings"]]
        faults += [f"{where}: arithmetic on bfloat16: {text}" for text in row["ttir_faults"]]
    assert not faults, "\n".join(faults)


def test_arithmetic_on_bfloat16_is_found() -> None:
    lines = """
    %3 = arith.extf %2 : tensor<8xbf16> to tensor<8xf32>
    %4 = arith.addf %3, %3 : tensor<8xf32>
    %5 = arith.truncf %4 : tensor<8xf32> to tensor<8xbf16>
    %6 = arith.mulf %5, %5 : tensor<8xbf16>
    %7 = tt.dot %8, %9, %10 : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32>
    %8 = arith.maxnumf %5, %5 : bf16
    """
    assert [line.split(" ")[0] for line in ttir_faults(lines)] == ["%6", "%8"]


def test_the_gate_finds_what_it_is_there_for(tmp_path: Path) -> None:
    """A kernel that spills, reads narrowly and adds bfloat16 registers, compiled for real."""
    report = json.loads(run([str(Path(__file__).with_name("faulty.py"))], tmp_path))
    assert report["spills"] > 0
    assert report["wide_loads"] == 0
    assert any("addf" in line for line in report["ttir_faults"])
    assert any("mulf" in line for line in report["ttir_faults"])
