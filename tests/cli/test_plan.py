"""``r1sae plan`` and ``r1sae harvest --engine stream`` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from r1sae_fast.cli.main import app
from r1sae_fast.shards import ActivationShards


def r1sae(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_r1() -> None:
    run = r1sae("plan", "--memory", "24GiB", "--disk", "3", "--tflops", "80")
    assert run.exit_code == 0, run.output
    for part in ("406.5 GB", "673.2 GB", "22.24 B", "50.85 GFLOP", "does not fit", "scratch file"):
        assert part in run.output, part


def test_json_and_tokens() -> None:
    options = ("--memory", "500GB", "--disk", "3", "--tflops", "80", "--tokens", "5e8")
    run = r1sae("plan", *options, "--json")
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    assert found["bytes_of_weights"] == 406_522_447_168
    assert [way["way"] for way in found["ways"]] == ["resident", "streaming", "8 GPUs"]
    for way in found["ways"]:
        assert way["days"] == pytest.approx(way["days_per_billion_tokens"] / 2)
    assert "days for 5e+08 tokens" in r1sae("plan", *options).output


def test_a_checkpoint_here() -> None:
    from r1sae_fast.r1 import LocalEngine  # noqa: F401  # torch, as the command imports it
    from r1sae_fast.tiny_r1 import path

    options = ("--checkpoint", str(path()), "--layer", "3", "--context", "256", "--here")
    run = r1sae("plan", *options, "--pass-tokens", "4096", "--json")
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    assert found["bytes_of_weights"] < 7_000_000
    assert all(way["tokens_per_second"] for way in found["ways"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "61"], "layer 61 does not exist"),
        (["--memory", "lots"], "is no size"),
        (["--disk", "0"], "--disk is 0"),
        (["--tokens", "nan"], "--tokens is nan"),
        (["--utilisation", "2"], "--utilisation is 2"),
        (["--here"], "give --checkpoint"),
        (["--context", "200000"], "the model's is 163840"),
        (["--checkpoint", "nowhere"], "no such file"),
    ],
)
def test_refusals(options: list[str], message: str) -> None:
    run = r1sae("plan", *options)
    assert run.exit_code == 1
    assert message in run.output


def test_harvest_streams(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{i} plus {i + 3} is {2 * i + 3}." for i in range(40)), "utf-8")
    common = ("--prompts", str(texts), "--layer", "2", "--mode", "prefill", "--batch-size", "8")
    resident, streamed = tmp_path / "resident", tmp_path / "streamed"
    assert r1sae("harvest", *common, "--out", str(resident)).exit_code == 0
    options = ("--engine", "stream", "--max-memory", "8GB", "--pass-tokens", "200")
    run = r1sae("harvest", *common, *options, "--out", str(streamed))
    assert run.exit_code == 0, run.output
    assert "memory: at most" in run.output
    a, b = ActivationShards(resident), ActivationShards(streamed)
    assert len(a) == len(b) > 300
    assert a[:].activations.equal(b[:].activations)
    assert a[:].tokens.equal(b[:].tokens)
    assert not (streamed / ".stream").exists()
    # The rows are the same, so the resident engine may go on there; all is done already.
    again = r1sae("harvest", *common, "--out", str(streamed))
    assert again.exit_code == 0, again.output
    assert "0 of them now" in again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "stream", "--mode", "generate"], "reads texts"),
        (["--engine", "stream", "--mode", "prefill", "--max-memory", "5MB"], "at least"),
        (["--mode", "prefill", "--max-memory", "5GB"], "are of --engine stream"),
        (["--engine", "stream", "--mode", "prefill", "--max-memory", "x"], "is no size"),
    ],
)
def test_harvest_refusals(tmp_path: Path, options: list[str], message: str) -> None:
    out = ("--out", str(tmp_path / "out"), "--tiny-problems", "3", "--layer", "1")
    run = r1sae("harvest", *out, *options)
    assert run.exit_code == 1
    assert message in run.output
