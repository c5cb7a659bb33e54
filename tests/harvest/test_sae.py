"""Harvests of codes: an SAE beside the model, and nothing else written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from r1sae_fast import FastSAE
from r1sae_fast.cli.main import app
from r1sae_fast.encode import encode_shards
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.harvest import harvest
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.sae import Mode
from r1sae_fast.shards import CodeBatch, CodeShards

QUICK: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 10, "rows_per_shard": 80}
COLUMNS = ("tokens", "sequence_id", "position", "segment")
PROMPTS = [f"What is {i} plus {i + 1}?" for i in range(10)]


@pytest.fixture(scope="module")
def sae() -> FastSAE:
    torch.manual_seed(0)
    sae = FastSAE(64, 150, 8, mode="topk").requires_grad_(False)
    sae.calibrate_threshold(torch.randn(256, 64))
    return sae


def rows(folder: Path) -> CodeBatch:
    shards = CodeShards(folder)
    shards.verify()
    return shards[:]


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = rows(folder), rows(expected)
    for name in COLUMNS:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    # The last bits of products depend on the number of rows.
    dense = found.codes.to_dense(), wanted.codes.to_dense()
    torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("run", ["generate", "prefill"])
def test_the_same_as_in_two_steps(
    engine: LocalEngine, sae: FastSAE, tmp_path: Path, mode: Mode, run: Any
) -> None:
    """Harvested and then encoded, or at once: the same codes (bfloat16 is stored as it is)."""
    harvest(engine, PROMPTS, 1, tmp_path / "rows", mode=run, **QUICK)
    encode_shards(sae, tmp_path / "rows", tmp_path / "a", mode=mode, progress=False)
    harvest(engine, PROMPTS, 1, tmp_path / "b", mode=run, sae=sae, sae_mode=mode, **QUICK)
    assert_same(tmp_path / "b", tmp_path / "a")
    assert not list((tmp_path / "b").glob("activations*"))
    header = json.loads((tmp_path / "b/manifest.jsonl").read_text().splitlines()[0])
    described = json.loads((tmp_path / "a/manifest.jsonl").read_text().splitlines()[0])
    found, wanted = header["metadata"], described["metadata"]
    assert header["kind"] == "codes"
    for key in ("sae", "sae_fingerprint", "mode", "activations"):
        assert found[key] == wanted[key], key


def test_stopped_and_gone_on_with(engine: LocalEngine, sae: FastSAE, tmp_path: Path) -> None:
    def interrupted() -> Iterator[str]:
        yield from PROMPTS[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(engine, interrupted(), 1, tmp_path / "a", sae=sae, **QUICK)
    result = harvest(engine, PROMPTS, 1, tmp_path / "a", sae=sae, **QUICK)
    assert 0 < result.new_rows < result.rows
    harvest(engine, PROMPTS, 1, tmp_path / "b", sae=sae, **QUICK)
    assert_same(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="sae_mode was 'topk' and is now 'threshold'"):
        harvest(engine, PROMPTS, 1, tmp_path / "a", sae=sae, sae_mode="threshold", **QUICK)
    other = FastSAE(64, 150, 8, mode="topk")
    with pytest.raises(ValueError, match="sae_fingerprint was"):
        harvest(engine, PROMPTS, 1, tmp_path / "a", sae=other, **QUICK)
    with pytest.raises(ValueError, match="begun with other settings"):
        harvest(engine, PROMPTS, 1, tmp_path / "a", **QUICK)


def test_outliers_get_no_codes(engine: LocalEngine, sae: FastSAE, tmp_path: Path) -> None:
    norms = engine.residuals([engine.encode_prompt(PROMPTS[0])], 1)[0].float().norm(dim=1)
    limit = 1.001 * float(norms.median())  # not at a row's own norm
    harvest(engine, PROMPTS, 1, tmp_path / "a", mode="prefill", **QUICK)
    encode_shards(sae, tmp_path / "a", tmp_path / "b", norm_limit=limit, progress=False)
    harvest(engine, PROMPTS, 1, tmp_path / "c", mode="prefill", sae=sae, norm_limit=limit, **QUICK)
    assert_same(tmp_path / "c", tmp_path / "b")
    counts = rows(tmp_path / "c").codes.counts
    assert set(counts.tolist()) == {0, 8}


def test_refused(engine: LocalEngine, sae: FastSAE, tmp_path: Path) -> None:
    free = FastSAE(64, 80, 4, mode="batch_topk")
    out = tmp_path / "a"
    with pytest.raises(ValueError, match="would depend on the tokens"):
        harvest(engine, PROMPTS, 1, out, sae=free)
    with pytest.raises(ValueError, match="d_in 32, the model a residual stream of 64"):
        harvest(engine, PROMPTS, 1, out, sae=FastSAE(32, 80, 4, mode="topk"))
    with pytest.raises(ValueError, match="SAE lies on meta, the engine on cpu"):
        harvest(engine, PROMPTS, 1, out, sae=FastSAE(64, 80, 4, mode="topk", device="meta"))
    with pytest.raises(ValueError, match="codes are stored in float32 or bfloat16"):
        harvest(engine, PROMPTS, 1, out, sae=sae, dtype="float16")
    with pytest.raises(ValueError, match="there is none"):
        harvest(engine, PROMPTS, 1, out, sae_mode="topk")
    assert not out.exists()
    harvest(engine, PROMPTS[:2], 1, out, sae=free, sae_mode="batch_topk", **QUICK)
    assert free.mode == "batch_topk"


def test_not_finite_residuals_name_the_sequence(
    sae: FastSAE, checkpoint: Path, tmp_path: Path
) -> None:
    engine = LocalEngine.from_pretrained(checkpoint)
    engine.model.embed_tokens.weight.data[7] = torch.nan
    with pytest.raises(NonFiniteError, match="of sequence 1 holds a NaN"):
        harvest(engine, [[2, 3], [4, 5, 7]], 1, tmp_path / "a", mode="prefill", sae=sae)


def r1sae(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["harvest", *map(str, arguments)])


def test_command(checkpoint: Path, sae: FastSAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "sae")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 1 plus 1?\nWhat is 2 plus 2?\n")
    common = ("--model", checkpoint, "--prompts", prompts, "--layer", 1, "--max-new-tokens", 4)
    result = r1sae(*common, "--out", tmp_path / "a", "--sae", tmp_path / "sae")
    assert result.exit_code == 0, result.output
    codes = rows(tmp_path / "a").codes
    assert codes.d_sae == 150
    assert codes.uniform_k == 8
    refused = r1sae(*common, "--out", tmp_path / "b", "--skip-outliers")
    assert "give --sae FOLDER" in refused.stderr
    refused = r1sae(*common, "--out", tmp_path / "b", "--sae", tmp_path / "sae", "--skip-outliers")
    assert "does not say which rows are outliers" in refused.stderr
