"""``r1sae harvest`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from r1sae_fast.cli.main import app
from r1sae_fast.shards import ActivationShards


def r1sae(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["harvest", *map(str, arguments)])


def test_from_a_file_and_again(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 1 plus 1?\nWhat is 2 plus 2?\nWhat is 3 plus 3?\n")
    common = ("--model", checkpoint, "--layer", 1, "--prompts", prompts, "--out", tmp_path / "a")
    common = (*common, "--max-new-tokens", 5, "--batch-size", 2)
    first = r1sae(*common, "--tokens", 10)
    assert first.exit_code == 0, first.output
    assert "1 sequences" in first.stdout
    second = r1sae(*common)
    assert second.exit_code == 0, second.output
    assert "3 sequences" in second.stdout
    assert set(ActivationShards(tmp_path / "a")[:].sequence_id.tolist()) == {0, 1, 2}
    third = r1sae(*common)
    assert "0 of them now" in third.stdout
    refused = r1sae(*common, "--seed", 5)
    assert refused.exit_code == 1
    assert "seed was 0 and is now 5" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_problems_for_tiny_r1(checkpoint: Path, tmp_path: Path) -> None:
    common = ("--model", checkpoint, "--tiny-problems", 5, "--layer", 2, "--max-new-tokens", 4)
    result = r1sae(*common, "--out", tmp_path / "a", "--dtype", "float32", "--seed", 7)
    assert result.exit_code == 0, result.output
    header = json.loads((tmp_path / "a/manifest.jsonl").read_text().splitlines()[0])
    assert header["dtype"] == "float32"
    assert header["metadata"]["layer"] == 2
    assert header["metadata"]["sampling"]["seed"] == 7
    assert len(set(ActivationShards(tmp_path / "a")[:].sequence_id.tolist())) == 5


def test_prefill(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "What is 1 plus 1?", "response": "Okay</think> 2."}\n')
    result = r1sae(
        *("--model", checkpoint, "--prompts", prompts, "--layer", 0, "--mode", "prefill"),
        *("--engine-dtype", "float32", "--out", tmp_path / "a"),
    )
    assert result.exit_code == 0, result.output
    assert set(ActivationShards(tmp_path / "a")[:].segment.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --prompts FILE or --tiny-problems N"),
        (["--tiny-problems", "2", "--prompts", "x.txt"], "either --prompts"),
        (["--prompts", "missing.txt"], "missing.txt: no such file"),
        (["--tiny-problems", "2", "--layer", "9"], "the model has 0 to 2"),
        (["--tiny-problems", "2", "--model", "nowhere"], "config.json: no such file"),
    ],
)
def test_errors_are_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "a"
    result = r1sae("--model", checkpoint, "--layer", 1, "--out", out, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_dequantised_weights(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 1 plus 1?\n")
    common = ("--model", checkpoint, "--prompts", prompts, "--layer", 1, "--mode", "prefill")
    for engine in ("local", "stream"):
        out = tmp_path / engine
        result = r1sae(*common, "--out", out, "--engine", engine, "--fp8", "dequantize")
        assert result.exit_code == 0, result.output
        header = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])
        assert header["metadata"]["fp8"] == "dequantize"
    again = r1sae(*common, "--out", tmp_path / "local")
    assert again.exit_code == 1
    assert "fp8 was 'dequantize' and is now 'w8a8'" in again.stderr
    other = r1sae(*common, "--out", tmp_path / "hf", "--engine", "hf", "--fp8", "dequantize")
    assert other.exit_code == 1
    assert "--fp8 is of --engine local and stream" in other.stderr
