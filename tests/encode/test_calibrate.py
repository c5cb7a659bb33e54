"""calibrate(): the exact threshold over all rows together, and an SAE that says so."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from r1sae_fast import FastSAE
from r1sae_fast.calibrate import _Strongest, calibrate
from r1sae_fast.cli.main import app
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.shards import ActivationShards, ActivationWriter

ROWS, D_IN, D_SAE, K = 700, 16, 63, 4


def write(folder: Path, rows: Tensor) -> ActivationShards:
    number = torch.arange(len(rows))
    with ActivationWriter(folder, rows.shape[1], dtype="float32", check_finite=False) as writer:
        writer.write(rows, tokens=number, sequence_id=number // 100, position=number % 100)
    return ActivationShards(folder)


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sae() -> FastSAE:
    torch.manual_seed(0)
    return FastSAE(D_IN, D_SAE, K)


@pytest.mark.parametrize("batch_rows", [1, 64, 10_000])
@pytest.mark.parametrize("l0", [0.01, 1.5, None, 12, 25])
@torch.no_grad()
def test_so_many_codes_lie_above(
    sae: FastSAE, rows: Tensor, tmp_path: Path, l0: float | None, batch_rows: int
) -> None:
    found = calibrate(sae, write(tmp_path / "rows", rows), l0, batch_rows=batch_rows)
    wanted = K if l0 is None else l0
    strongest = sae.pre_activations(rows).flatten().sort(descending=True).values
    count = round(wanted * ROWS)
    # Sums of other batches differ in the last bits.
    assert found.threshold == pytest.approx(float(strongest[count - 1]), rel=1e-5)
    assert found.rows == ROWS
    assert found.left_out == 0
    assert found.wanted == wanted
    assert found.l0 == pytest.approx(count / ROWS)
    assert sae.mode == "batch_topk"
    assert float(sae.threshold) == found.threshold
    sae.mode = "threshold"
    assert sae.encode_sparse(rows).nnz == pytest.approx(count, abs=2)


def test_fewer_codes_than_wanted(sae: FastSAE, rows: Tensor, tmp_path: Path) -> None:
    found = calibrate(sae, write(tmp_path / "rows", rows), D_SAE)
    assert found.threshold == 0.0
    assert found.l0 == pytest.approx(int((sae.pre_activations(rows) > 0).sum()) / ROWS)


def test_equal_strengths(tmp_path: Path) -> None:
    sae = FastSAE(4, 8, 2, dtype=torch.bfloat16)
    shards = write(tmp_path / "rows", torch.randn(1, 4).abs().repeat(500, 1) * 3)
    with torch.no_grad():
        sae.W_enc.fill_(0.5)
    found = calibrate(sae, shards, 2)
    assert found.l0 == 8  # all are the same: none can be told from another
    sae.mode = "threshold"
    assert sae.encode_sparse(shards[:].activations.bfloat16()).nnz == 4000


def test_outliers_are_left_out(sae: FastSAE, rows: Tensor, tmp_path: Path) -> None:
    sinks = rows.clone()
    sinks[::100] *= 1000
    found = calibrate(sae, write(tmp_path / "sinks", sinks))
    assert (found.rows, found.left_out) == (ROWS - 7, 7)
    kept = torch.ones(ROWS, dtype=torch.bool)
    kept[::100] = False
    alone = calibrate(sae, write(tmp_path / "rows", rows[kept]))
    assert found.threshold == pytest.approx(alone.threshold, rel=1e-5)
    sae.metadata["norm_limit"] = 1e9
    assert calibrate(sae, tmp_path / "sinks").left_out == 0


def test_some_rows_stand_for_all(sae: FastSAE, rows: Tensor, tmp_path: Path) -> None:
    shards = write(tmp_path / "rows", rows)
    found = calibrate(sae, shards, max_rows=300, batch_rows=128)
    assert found.rows == 300
    assert found.threshold == pytest.approx(calibrate(sae, shards).threshold, rel=0.2)


def test_bad_input_changes_nothing(sae: FastSAE, rows: Tensor, tmp_path: Path) -> None:
    shards = write(tmp_path / "rows", rows)
    sae.threshold = torch.tensor(0.25)
    for l0 in (0, -1, D_SAE + 1, float("nan")):
        with pytest.raises(ValueError, match="l0 is"):
            calibrate(sae, shards, l0)
    with pytest.raises(ValueError, match="d_in = 5, the SAE 16"):
        calibrate(sae, write(tmp_path / "narrow", torch.randn(3, 5)))
    with pytest.raises(ValueError, match="no rows"):
        calibrate(sae, write(tmp_path / "none", torch.empty(0, D_IN)))
    rows[650, 3] = torch.nan
    sae.metadata["norm_limit"] = 1e9  # else the sample would find it
    with pytest.raises(NonFiniteError, match="position 50 of sequence 6"):
        calibrate(sae, write(tmp_path / "nan", rows), batch_rows=64)
    assert float(sae.threshold) == 0.25
    assert sae.mode == "batch_topk"


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.integers(1, 8), max_size=60),
    size=st.integers(1, 20),
    parts=st.integers(1, 7),
)
def test_the_strongest_of_many(values: list[int], size: int, parts: int) -> None:
    strongest = _Strongest(size, 0.0)
    for part in torch.tensor(values, dtype=torch.float32).split(parts):
        strongest.add(part[part >= strongest.bound])
    found = strongest.found()
    if len(values) < size:
        assert found is None
    else:
        bound = sorted(values, reverse=True)[size - 1]
        assert found == (bound, sum(value >= bound for value in values))


def test_the_command(sae: FastSAE, rows: Tensor, tmp_path: Path) -> None:
    write(tmp_path / "rows", rows)
    sae.save(tmp_path / "sae")
    run = CliRunner().invoke(
        app,
        ["calibrate", *(str(tmp_path / name) for name in ("sae", "rows", "out")), "--l0", "3"],
    )
    assert run.exit_code == 0, run.output
    assert "3.00 codes a row on 700 rows" in run.output
    saved = FastSAE.load(tmp_path / "out")
    assert float(saved.threshold) > 0
    assert saved.metadata["calibration"]["wanted"] == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mode"] == "batch_topk"
    from r1sae_fast.encode import choose_mode

    assert choose_mode(saved, None) == "threshold"
    (tmp_path / "file.pt").touch()
    run = CliRunner().invoke(
        app, ["calibrate", *(str(tmp_path / name) for name in ("file.pt", "rows", "out"))]
    )
    assert run.exit_code == 1
    assert "--released logic" in run.output
