"""FeatureDB.open recognises the released files, joins their labels, and refuses all else."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import pytest

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.released import connect

Release = Any  # conftest's


@pytest.fixture(scope="module")
def folder(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logic")
    release.as_duckdb(folder / "logic-0-1.ddb")
    release.sqlite_labels(folder / "autointerp.db")
    return folder


def as_csv(release: Release, folder: Path) -> Path:
    release.csv_labels(folder / "autointerp.csv")
    return release.as_duckdb(folder / "math.ddb")


@pytest.mark.parametrize("kind", ["sqlite", "csv", "trio", "folder"])
def test_the_notebook_gets_the_same_rows(
    release: Release, folder: Path, tmp_path: Path, ask: Any, kind: str
) -> None:
    path = {
        "sqlite": lambda: folder / "logic-0-1.ddb",
        "csv": lambda: as_csv(release, tmp_path),
        "trio": lambda: release.trio(tmp_path / "first"),
        "folder": lambda: folder,
    }[kind]()
    schema = "" if kind == "trio" else "ds."
    with FeatureDB.open(path) as db:
        first = db.sql("SELECT * FROM autointerp LIMIT 1").to_pylist()[0]
        names = ["feature_id", "label", "quality", "interestingness", "model_name"]
        assert [first[name] for name in names] == list(release.labels[0][:5])
        assert db.sql(f"SELECT * FROM {schema}tokens LIMIT 1").to_pylist() == [
            dict(zip(("sequence_id", "token_idx", "token", "decoded_token"), release.tokens[0],
                     strict=True))
        ]  # fmt: skip
        assert db.sql(f"SELECT * FROM {schema}activations LIMIT 1").to_pylist() == [
            dict(zip(("feature_id", "sequence_id", "token_idx", "strength"), release.activations[0],
                     strict=True))
        ]  # fmt: skip
        for feature in (0, 7, 36):
            wanted = release.around_the_strongest(feature, 10, 5)
            assert ask(db, feature, 10, 5, schema) == wanted
            # And by our own way to the same rows.
            mine = {
                (example.feature_id, db.feature(feature).labels[0].label, example.sequence_id,
                 example.token_idx, example.strength, token.token_idx, token.text)
                for example in db.top(feature, 10, 5) for token in example.context
            }  # fmt: skip
            assert mine == wanted


def test_numbers_of_features_and_labels(release: Release, folder: Path) -> None:
    with FeatureDB.open(folder) as db:
        assert db.d_sae == 40  # the last three are never active, and have labels
        assert db.feature(39).count == 0
        assert db.feature(2).labels == ()
        assert db.search("label 11")[0].feature_id == 11
        assert db.searched == ("labels",)
    with FeatureDB.open(folder, labels=False) as db:
        assert db.d_sae == 37
        assert "autointerp" not in db.tables


def test_features_of_a_large_file_are_not_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "_MANY_ROWS", 10)
    with FeatureDB.open(folder, labels=False) as db:
        assert 37 <= db.d_sae <= 40  # a bound, from DuckDB's statistics


def test_every_file_of_the_first_release_leads_to_it(release: Release, tmp_path: Path) -> None:
    release.trio(tmp_path)
    for name in ("tokens.db", "feature_activations.db", "autointerp.db"):
        with FeatureDB.open(tmp_path / name) as db:
            assert len(db.top(5, 3)) == 3
            assert db.feature(5).labels[0].label == "label 5"
    (tmp_path / "tokens.db").unlink()
    for path, message in (
        ("autointerp.db", r"labels alone are no database; the table tokens .* is not here"),
        ("feature_activations.db", r"the table tokens .* found: |found feature_activations\.db"),
        (".", "is not here"),
    ):
        with pytest.raises(DatabaseError, match=message):
            FeatureDB.open(tmp_path / path)


def test_sqlite_files_too_large_for_memory(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release.trio(tmp_path)
    monkeypatch.setattr(connect, "IN_MEMORY_BYTES", 1000)
    with pytest.raises(DatabaseError, match=r"import them once.*r1sae features import"):
        FeatureDB.open(tmp_path)


def test_labels_that_were_named(release: Release, folder: Path, tmp_path: Path) -> None:
    database = release.as_duckdb(tmp_path / "a.ddb")
    with FeatureDB.open(database) as db:
        assert "autointerp" not in db.tables
    with FeatureDB.open(database, labels=folder / "autointerp.db") as db:
        assert db.feature(3).labels[0].label == "label 3"
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        FeatureDB.open(database, labels=tmp_path / "none.csv")
    # Labels may be a DuckDB file too; and a database that has its own takes no others.
    with duckdb.connect(str(tmp_path / "labels.ddb")) as connection:
        connection.execute("CREATE TABLE autointerp AS SELECT 3 AS feature_id, 'mine' AS label")
    with FeatureDB.open(database, labels=tmp_path / "labels.ddb") as db:
        assert db.feature(3).labels[0].label == "mine"
        assert db.feature(3).labels[0].quality is None
    with duckdb.connect(str(database)) as connection:
        connection.execute("CREATE TABLE autointerp AS SELECT 3 AS feature_id, 'inside' AS label")
    with pytest.raises(ValueError, match=r"has labels already"):
        FeatureDB.open(database, labels=tmp_path / "labels.ddb")


WRITES = [
    "CREATE TABLE x AS SELECT 1",
    "CREATE TABLE ds.x AS SELECT 1",
    "INSERT INTO ds.tokens SELECT * FROM ds.tokens",
    "DELETE FROM autointerp",
    "COPY tokens TO '{out}'",
    "ATTACH '{out}' AS other",
    "SET enable_external_access = true",
    "EXPORT DATABASE '{out}'",
    "INSTALL httpfs",
]
READS = [
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_csv('{secret}')",
    "FROM '{secret}'",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM sqlite_scan('{secret}', 'x')",
]


@pytest.mark.parametrize("kind", ["duckdb", "trio"])
def test_sql_neither_writes_nor_reads_other_files(
    release: Release, folder: Path, tmp_path: Path, kind: str
) -> None:
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("secret\n")
    path = folder if kind == "duckdb" else release.trio(tmp_path / "first")
    with FeatureDB.open(path) as db:
        before = db.sql("SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM autointerp)")
        for query in (*WRITES, *READS):
            with pytest.raises(ValueError, match=r"^SQL: "):
                db.sql(query.format(out=out, secret=secret, folder=tmp_path))
        assert not out.exists()
        after = db.sql("SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM autointerp)")
        assert after == before


def test_other_schemas_are_described_and_refused(release: Release, tmp_path: Path) -> None:
    def made(name: str, *statements: str) -> Path:
        with duckdb.connect(str(tmp_path / name)) as connection:
            for statement in statements:
                connection.execute(statement)
        return tmp_path / name

    tokens = "CREATE TABLE tokens (sequence_id INT, token_idx INT, token INT, decoded_token TEXT)"
    activations = (
        "CREATE TABLE activations (feature_id INT, sequence_id INT, token_idx INT, strength {})"
    )
    text = tmp_path / "text"
    text.write_text("x")
    cases = {
        "type.ddb": (
            [tokens, activations.format("TEXT")],
            r"activations\.strength is of type VA",
        ),
        "column.ddb": (
            [tokens, "CREATE TABLE activations (feature INT, x FLOAT)"],
            r"no column feature_id. It has activations\(feature INTEGER, x FLOAT\), tokens\(seq",
        ),
        "other.ddb": (["CREATE TABLE a (b INT)"], r"lacks the tables tokens and activations"),
        "empty.ddb": ([], r"It has no tables; exp"),
        "view.ddb": (
            [tokens, f"CREATE VIEW activations AS SELECT content FROM read_text('{text}')"],
            r"lacks the table activations. It has tokens\(",
        ),
    }
    for name, (statements, message) in cases.items():
        with pytest.raises((DatabaseError, ValueError), match=message):
            FeatureDB.open(made(name, *statements))
    with closing(sqlite3.connect(tmp_path / "other.db")) as file:
        file.execute('CREATE TABLE people ("name\x1b[2J" TEXT)')
        file.commit()
    with pytest.raises(DatabaseError, match=r"known here: it has people\(name␛\[2J TEXT\); exp"):
        FeatureDB.open(tmp_path / "other.db")
    with pytest.raises(DatabaseError, match="holds several databases"):
        FeatureDB.open(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatabaseError, match="holds no feature database"):
        FeatureDB.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="fetch a released one"):
        FeatureDB.open(tmp_path / "none.ddb")


def test_damaged_sqlite_files(release: Release, tmp_path: Path) -> None:
    release.trio(tmp_path)
    path = tmp_path / "feature_activations.db"
    whole = path.read_bytes()
    for length in (20, 3000, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(DatabaseError, match=r"\.db"):
            FeatureDB.open(path)
    path.write_bytes(whole)
    with closing(sqlite3.connect(path)) as file:
        file.execute("UPDATE feature_activations SET strength = 'much' WHERE rowid = 100")
        file.commit()
    with pytest.raises(DatabaseError, match=r"strength holds a value that is no float in rows 1 t"):
        FeatureDB.open(path)


HEADER = b"feature_id,label,quality,interestingness,model_name,prompt_version\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"no column feature_id \(found: none\)"),
        (b"a,b\n1,2\n", r"found: a, b"),
        (HEADER + b"x,label,1,1,m,v\n", r"row 1 is of feature 'x'"),
        (HEADER + b"-1,label,1,1,m,v\n", r"row 1 is of feature '-1'"),
        (HEADER + b"1,label,1,1,m,v\n2,la", r"row 2 has 2 fields, the first line 6"),
        (bytes(range(256)) * 4, r"autointerp\.csv"),
    ],
)
def test_bad_labels(release: Release, tmp_path: Path, content: bytes, message: str) -> None:
    database = release.as_duckdb(tmp_path / "math.ddb")
    (tmp_path / "autointerp.csv").write_bytes(content)
    with pytest.raises(DatabaseError, match=message):
        FeatureDB.open(database)


def test_odd_labels_are_kept(release: Release, tmp_path: Path) -> None:
    database = release.as_duckdb(tmp_path / "math.ddb")
    rows = b"1,\xff\xfe broken,N/A,,m,v\n\n2,,nan,1e999,,\n"
    (tmp_path / "autointerp.csv").write_bytes(b"\xef\xbb\xbf" + HEADER + rows)
    with FeatureDB.open(database) as db:
        (one,) = db.feature(1).labels
        assert (one.label, one.quality, one.interestingness) == ("�� broken", None, None)
        (two,) = db.feature(2).labels
        assert (two.quality, two.interestingness) == (None, None)
