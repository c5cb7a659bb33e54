"""Features that fire on a text are those that the database has for it; others' are refused."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from r1sae_fast import FastSAE
from r1sae_fast.cli.main import app
from r1sae_fast.encode import describe_sae
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.shards import CodeWriter

TEXTS = ("What is 2 plus 3?", "Wait, that was wrong. It is 12.", "so the answer is 7.")
LAYER = 1


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine.from_pretrained("tiny-r1", last_layer=LAYER)


@pytest.fixture(scope="module")
def folder(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE, and a database of what it says of the texts, each read alone."""
    folder = tmp_path_factory.mktemp("firing")
    torch.manual_seed(0)
    sae = FastSAE(engine.hidden_size, 128, k=4, mode="topk")
    sae.save(folder / "sae")
    metadata = {"layer": LAYER, "model": engine.name, "model_fingerprint": engine.fingerprint}
    # Text by text, so that both sides add up matrices of one shape: the same to the last bit.
    described = {**describe_sae(sae, "topk", None), "activations": metadata}
    with CodeWriter(folder / "codes", sae.d_sae, described) as writer:
        for number, text in enumerate(TEXTS):
            ids = engine.encode_text(text)
            with torch.no_grad():
                codes = sae.encode_sparse(engine.residuals([ids], LAYER)[0].float())
            writer.write(
                codes,
                tokens=torch.tensor(ids),
                sequence_id=number,
                position=torch.arange(len(ids)),
            )
    tokenizer = engine.require_tokenizer()
    FeatureDB.build(
        folder / "f.ddb",
        folder / "codes",
        decode=lambda token: tokenizer.decode([token]),
        progress=False,
    ).close()
    return folder


def test_they_are_the_databases_own_for_that_text(folder: Path, engine: LocalEngine) -> None:
    with FeatureDB(folder / "f.ddb") as db:
        for number, text in enumerate(TEXTS):
            found = db.firing(text, folder / "sae", engine, sort="feature_id", n=None, bos=True)
            expected = db.sql(
                "SELECT feature_id, max(strength) AS strength, count(*) AS tokens "
                "FROM activations WHERE sequence_id = ? GROUP BY ALL ORDER BY ALL",
                [number],
            ).to_pylist()
            columns = ("feature_id", "strength", "tokens")
            assert [{name: row[name] for name in columns} for row in found] == expected
            assert all(0 < row["relative"] <= 1 for row in found)
            inside = db.firing(text, folder / "sae", engine, n=None, columns=["token_idx"])
            assert min(row["token_idx"] for row in inside) == 1  # not the token that begins


def test_conditions_and_columns_of_both(folder: Path, engine: LocalEngine) -> None:
    with FeatureDB(folder / "f.ddb") as db:
        found = db.firing(
            TEXTS[1],
            folder / "sae",
            engine,
            where="relative == 1 and density < 0.5 and tokens >= 1",
            sort="-strength",
            n=None,
        )
        assert len(found) > 0
        strengths = [row["strength"] for row in found]
        assert strengths == sorted(strengths, reverse=True)
        assert found.columns[:2] == ("feature_id", "strength")


def test_the_command_loads_tiny_r1(folder: Path) -> None:
    arguments = ["features", "firing", str(folder / "f.ddb"), TEXTS[1], "--sae"]
    result = CliRunner().invoke(app, [*arguments, str(folder / "sae"), "--json", "-n", "3"])
    assert result.exit_code == 0, result.output
    with FeatureDB(folder / "f.ddb") as db:
        expected = db.firing(TEXTS[1], folder / "sae", n=3).to_dicts()
    assert [json.loads(line) for line in result.output.splitlines()] == expected


def test_another_sae_is_refused(folder: Path, engine: LocalEngine, tmp_path: Path) -> None:
    other = FastSAE.load(folder / "sae")
    with torch.no_grad():
        other.b_enc[3] += 1
    with FeatureDB(folder / "f.ddb") as db:
        with pytest.raises(DatabaseError, match=r"checksum \w{16}, this one has \w{16}"):
            db.firing(TEXTS[0], other, engine)
        with pytest.raises(DatabaseError, match="d_sae = 128, this one has 64"):
            db.require_sae(FastSAE(engine.hidden_size, 64, k=4))
        db.require_sae(FastSAE.load(folder / "sae"))


def test_another_model_is_refused(folder: Path) -> None:
    engine = LocalEngine.from_pretrained("tiny-r1", last_layer=LAYER)
    engine.fingerprint = "0" * 16
    with (
        FeatureDB(folder / "f.ddb") as db,
        pytest.raises(DatabaseError, match="of the model 'tiny-r1' with checksum"),
    ):
        db.firing(TEXTS[0], folder / "sae", engine)


def test_a_database_of_another_sae_is_refused(folder: Path, database: FeatureDB) -> None:
    with FeatureDB(folder / "f.ddb") as db:
        db.require_same_sae(db)
        with pytest.raises(DatabaseError, match=r"is of another SAE \(d_sae 12"):
            db.require_same_sae(database)
