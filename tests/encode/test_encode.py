"""encode_shards(): row for row what the SAE says, whatever interrupts it, in the mode it says."""

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1sae_fast import FastSAE
from r1sae_fast.encode import choose_mode, encode_shards
from r1sae_fast.errors import NonFiniteError, ShardError
from r1sae_fast.sae import Mode
from r1sae_fast.shards import ActivationShards, ActivationWriter, CodeShards

ROWS, D_IN, D_SAE, K = 700, 16, 63, 4


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shards(tmp_path: Path, rows: Tensor) -> ActivationShards:
    return write(tmp_path / "activations", rows)


def write(folder: Path, rows: Tensor, *, check_finite: bool = True) -> ActivationShards:
    number = torch.arange(len(rows))
    with ActivationWriter(
        folder, D_IN, dtype="float32", rows_per_shard=256, check_finite=check_finite,
        metadata={"layer": 2},
    ) as writer:  # fmt: skip
        writer.write(
            rows, tokens=number % 50, sequence_id=number // 100, position=number % 100,
            segment=number % 3,
        )  # fmt: skip
    return ActivationShards(folder)


@pytest.fixture
def sae() -> FastSAE:
    torch.manual_seed(0)
    return FastSAE(D_IN, D_SAE, K)


@pytest.fixture
def calibrated(sae: FastSAE, rows: Tensor) -> FastSAE:
    sae.calibrate_threshold(rows)
    return sae


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix}


@pytest.mark.parametrize("mode", ["topk", "batch_topk", "threshold"])
@pytest.mark.parametrize("batch_rows", [1, 63, 256, 5000])
def test_codes_are_those_of_the_sae(
    calibrated: FastSAE, shards: ActivationShards, rows: Tensor, tmp_path: Path, mode: Mode,
    batch_rows: int,
) -> None:  # fmt: skip
    codes = encode_shards(
        calibrated, shards, tmp_path / "codes", mode=mode, batch_rows=batch_rows, progress=False
    )
    assert calibrated.mode == "batch_topk"  # left as it was
    calibrated.mode = mode
    with torch.no_grad():
        expected = torch.cat([calibrated.encode(part) for part in rows.split(batch_rows)])
    batch = codes[:]
    torch.testing.assert_close(batch.codes.to_dense(), expected, rtol=0, atol=1e-6)
    source = shards[:]
    for column in ("tokens", "sequence_id", "position", "segment"):
        assert torch.equal(getattr(batch, column), getattr(source, column)), column
    assert codes.metadata["mode"] == mode
    assert codes.metadata["activations"] == {"layer": 2}
    assert codes.metadata["activations_fingerprint"] == shards.fingerprint
    assert codes.metadata.get("batch_rows") == (batch_rows if mode == "batch_topk" else None)
    codes.verify(progress=False)


def test_the_mode_is_threshold_where_it_can_be(sae: FastSAE, rows: Tensor) -> None:
    assert choose_mode(sae) == "batch_topk"
    with pytest.raises(ValueError, match="this SAE has none; calibrate it"):
        choose_mode(sae, "threshold")
    sae.calibrate_threshold(rows)
    assert choose_mode(sae) == "threshold"
    assert choose_mode(sae, "batch_topk") == "batch_topk"
    sae.mode = "topk"
    assert choose_mode(sae) == "topk"
    with pytest.raises(ValueError, match="mode is 'best'"):
        choose_mode(sae, "best")  # type: ignore[arg-type]  # what the test is about


@pytest.mark.parametrize("stop", [1, 64, 128, 600])
@pytest.mark.parametrize("mode", ["batch_topk", "threshold"])
def test_an_interrupted_encoding_gives_the_same_files(
    calibrated: FastSAE, shards: ActivationShards, tmp_path: Path, mode: Mode, stop: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("r1sae_fast.encode._ROWS_PER_SHARD", 128)

    def interrupt(rows: int) -> None:
        if rows >= stop:
            raise KeyboardInterrupt

    def run(folder: str, on_rows: object = None) -> None:
        encode_shards(
            calibrated, shards, tmp_path / folder, mode=mode, batch_rows=32, progress=False,
            on_rows=on_rows,  # type: ignore[arg-type]  # one of the functions here
        )  # fmt: skip

    run("undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run("resumed", interrupt)
    assert len(CodeShards(tmp_path / "resumed")) == -(-stop // 32) * 32 // 128 * 128
    run("resumed")
    assert files(tmp_path / "resumed") == files(tmp_path / "undisturbed")
    run("resumed")  # nothing left to do
    assert files(tmp_path / "resumed") == files(tmp_path / "undisturbed")


def test_rows_beyond_the_norm_limit_have_no_codes(
    calibrated: FastSAE, rows: Tensor, tmp_path: Path
) -> None:
    rows[[0, 40, 699]] *= 100
    shards = write(tmp_path / "outliers", rows)
    limit = 50.0
    codes = encode_shards(
        calibrated, shards, tmp_path / "codes", batch_rows=64, norm_limit=limit, progress=False
    )
    counts = codes[:].codes.counts
    assert counts[[0, 40, 699]].tolist() == [0, 0, 0]
    calibrated.mode = "threshold"
    with torch.no_grad():
        expected = calibrated.encode(rows)
    expected[[0, 40, 699]] = 0
    torch.testing.assert_close(codes[:].codes.to_dense(), expected, rtol=0, atol=1e-6)
    assert codes.metadata["norm_limit"] == limit


def test_no_rows(calibrated: FastSAE, tmp_path: Path) -> None:
    shards = write(tmp_path / "none", torch.empty(0, D_IN))
    assert len(encode_shards(calibrated, shards, tmp_path / "codes", progress=False)) == 0


# -- bad input ------------------------------------------------------------------------------------


def test_another_width_is_named(shards: ActivationShards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"activations have d_in = 16, the SAE 17"):
        encode_shards(FastSAE(17, D_SAE, K), shards, tmp_path / "codes", progress=False)
    assert not (tmp_path / "codes").exists()


def test_a_nan_row_is_named_and_finished_shards_stay(
    calibrated: FastSAE, rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1sae_fast.encode._ROWS_PER_SHARD", 128)
    rows[333, 3] = float("nan")
    shards = write(tmp_path / "nan", rows, check_finite=False)
    with pytest.raises(NonFiniteError, match="row 333"):
        encode_shards(calibrated, shards, tmp_path / "codes", batch_rows=64, progress=False)
    assert len(CodeShards(tmp_path / "codes")) == 256


def test_another_sae_or_other_settings_are_refused(
    calibrated: FastSAE, shards: ActivationShards, tmp_path: Path
) -> None:
    encode_shards(calibrated, shards, tmp_path / "codes", mode="topk", progress=False)
    before = files(tmp_path / "codes")
    with pytest.raises(ValueError, match="metadata"):
        encode_shards(calibrated, shards, tmp_path / "codes", mode="threshold", progress=False)
    with torch.no_grad():
        calibrated.b_enc[0] += 1
    with pytest.raises(ValueError, match="metadata"):
        encode_shards(calibrated, shards, tmp_path / "codes", mode="topk", progress=False)
    with pytest.raises(FileExistsError, match="holds shards already"):
        encode_shards(
            calibrated, shards, tmp_path / "codes", mode="topk", resume=False, progress=False
        )
    assert files(tmp_path / "codes") == before


def test_two_encodings_into_one_folder(
    calibrated: FastSAE, shards: ActivationShards, tmp_path: Path
) -> None:
    def again(rows: int) -> None:
        with pytest.raises(ShardError, match=re.escape(str(tmp_path / "codes"))):
            encode_shards(calibrated, shards, tmp_path / "codes", progress=False)

    encode_shards(calibrated, shards, tmp_path / "codes", progress=False, on_rows=again)


@pytest.mark.parametrize("batch_rows", [0, -1, 2.0, True])
def test_batch_rows(
    calibrated: FastSAE, shards: ActivationShards, tmp_path: Path, batch_rows: int
) -> None:
    with pytest.raises(ValueError, match="batch_rows is"):
        encode_shards(calibrated, shards, tmp_path / "codes", batch_rows=batch_rows)


# -- kill -9 --------------------------------------------------------------------------------------

PROGRAM = """
import sys
import r1sae_fast.encode
from r1sae_fast import FastSAE
r1sae_fast.encode._ROWS_PER_SHARD = 64
r1sae_fast.encode.encode_shards(FastSAE.load(sys.argv[1]), sys.argv[2], sys.argv[3],
                                mode="batch_topk", batch_rows=8)
"""


@pytest.mark.slow
def test_an_encoding_killed_at_random_moments(
    calibrated: FastSAE, rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write(tmp_path / "many", rows.repeat(20, 1))
    calibrated.save(tmp_path / "sae")
    rng = random.Random(0)
    manifest = tmp_path / "codes" / "manifest.jsonl"
    command = [
        sys.executable, "-c", PROGRAM, str(tmp_path / "sae"), str(shards.folder),
        str(manifest.parent),
    ]  # fmt: skip
    for _ in range(3):
        size = manifest.stat().st_size if manifest.exists() else 0
        with subprocess.Popen(command) as process:
            while process.poll() is None and not (
                manifest.exists() and manifest.stat().st_size > size
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            if process.wait() != -signal.SIGKILL:
                break  # it was quicker
    assert subprocess.run(command, timeout=1800, check=False).returncode == 0
    monkeypatch.setattr("r1sae_fast.encode._ROWS_PER_SHARD", 64)
    encode_shards(
        calibrated, shards, tmp_path / "undisturbed", mode="batch_topk", batch_rows=8,
        progress=False,
    )  # fmt: skip
    assert files(manifest.parent) == files(tmp_path / "undisturbed")
