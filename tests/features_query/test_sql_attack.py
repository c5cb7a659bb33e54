"""Whatever SQL tries, no other file is read or written, and nothing changes."""

import os
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB

ATTACKS = [
    "COPY tokens TO '{0}/x.csv'",
    "COPY (SELECT 1) TO '{0}/x.parquet'",
    "COPY tokens FROM '{0}/secret.csv'",
    "EXPORT DATABASE '{0}/exp'",
    "IMPORT DATABASE '{0}/exp'",
    "ATTACH '{0}/other.ddb' AS o",
    "ATTACH ':memory:' AS o",
    "SELECT * FROM read_csv('{0}/secret.csv')",
    "FROM '{0}/secret.csv'",
    "FROM '{0}/other.ddb'",
    "SELECT * FROM read_text('{0}/secret.csv')",
    "SELECT * FROM read_blob('{0}/*')",
    "SELECT * FROM glob('{0}/*')",
    "SELECT * FROM read_json('{0}/secret.csv')",
    "SELECT * FROM parquet_metadata('{0}/secret.csv')",
    "SELECT * FROM sniff_csv('{0}/secret.csv')",
    "SELECT * FROM read_csv('s3://bucket/x.csv')",
    "SELECT * FROM query('COPY tokens TO ''{0}/x.csv''')",
    "SELECT * FROM query_table('{0}/secret.csv')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql("
    "'SELECT * FROM read_text(''{0}/secret.csv'')'))",
    "SUMMARIZE '{0}/secret.csv'",
    "DESCRIBE '{0}/secret.csv'",
    "PIVOT '{0}/secret.csv' ON a USING count(*)",
    "SELECT getenv('R1SAE_SECRET')",
    "SELECT * FROM in_python",
    "INSTALL httpfs",
    "LOAD '{0}/secret.csv'",
    "CREATE SECRET (TYPE s3)",
    "SET temp_directory = '{0}/t'",
    "RESET enable_external_access",
    "PRAGMA enable_profiling",
    "PRAGMA profiling_output = '{0}/profile'",
    "SELECT * FROM enable_logging(storage='file', storage_config={{'path': '{0}/log'}})",
    "EXPLAIN ANALYZE COPY tokens TO '{0}/x.csv'",
    "EXPLAIN ANALYZE SET threads = 1",
    "EXPLAIN ANALYZE DELETE FROM autointerp",
    "EXPLAIN ANALYZE INSERT INTO autointerp (label) VALUES ('x')",
    "WITH x AS (DELETE FROM autointerp RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE autointerp SET label = 'x' RETURNING *) SELECT * FROM x",
    "DELETE FROM tokens RETURNING *",
    "TRUNCATE autointerp",
    "CREATE TEMP TABLE mine AS SELECT 1",
    "CREATE MACRO sqrt(x) AS 0",
    "PREPARE p AS SELECT 1",
    "BEGIN",
    "CHECKPOINT",
    "SELECT 1; DROP TABLE tokens",
    "SELECT 1; COPY tokens TO '{0}/x.csv'",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What there is to steal, and a released database with its labels in a file of their own."""
    folder = tmp_path_factory.mktemp("attack")
    (folder / "secret.csv").write_text("a,b\n1,2\n")
    with duckdb.connect(str(folder / "other.ddb")) as connection:
        connection.execute("CREATE TABLE t AS SELECT 42 AS x")
    released = folder / "released"
    released.mkdir()
    with duckdb.connect(str(released / "logic.ddb")) as connection:
        connection.execute(
            "CREATE TABLE tokens AS SELECT 1::BIGINT AS sequence_id, 0::BIGINT AS token_idx, "
            "5::BIGINT AS token, 'x' AS decoded_token"
        )
        connection.execute(
            "CREATE TABLE activations AS SELECT 3::BIGINT AS feature_id, 1::BIGINT AS "
            "sequence_id, 0::BIGINT AS token_idx, 0.5::FLOAT AS strength"
        )
    (released / "autointerp.csv").write_text(
        "feature_id,label,quality,interestingness,model_name,prompt_version\n3,a label,1,1,m,v\n"
    )
    return folder


@pytest.fixture(scope="module", params=["built", "released"])
def attacked(request: pytest.FixtureRequest, folder: Path, database: FeatureDB) -> FeatureDB:
    if request.param == "built":
        return database
    opened = FeatureDB.open(folder / "released" / "logic.ddb")
    assert [label.label for label in opened.feature(3).labels] == ["a label"]
    return opened


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_read_written_or_changed(
    attack: str, attacked: FeatureDB, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R1SAE_SECRET", "secret")
    in_python = pa.table({"x": [1]})  # a variable of the caller's
    before = _contents(folder), attacked.path.read_bytes(), sorted(os.listdir(attacked.path.parent))
    labels = attacked.sql("SELECT * FROM autointerp ORDER BY ALL")
    with pytest.raises((ValueError, DatabaseError)):
        attacked.sql(attack.format(folder))
    after = _contents(folder), attacked.path.read_bytes(), sorted(os.listdir(attacked.path.parent))
    assert before == after
    assert attacked.sql("SELECT * FROM autointerp ORDER BY ALL").equals(labels)
    assert in_python.num_rows == 1


def test_a_table_of_its_own_does_not_stay(attacked: FeatureDB) -> None:
    attacked.sql("EXPLAIN ANALYZE CREATE TEMP TABLE mine AS SELECT 1")  # runs what it explains
    with pytest.raises(ValueError, match="mine does not exist"):
        attacked.sql("SELECT * FROM mine")
