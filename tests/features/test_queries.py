"""Queries give what sorting the codes by hand gives."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1sae_fast.features import FeatureDB, TopExamples

World = Any  # conftest's
ADDED = "INSERT INTO autointerp VALUES (4, 'Wait 100% [so]_x', 0.9, 0.5, 'judge', 'v1')"


def expected_top(world: World, feature: int, n: int, window: int) -> list[tuple[Any, ...]]:
    hits = sorted(
        (row for row in world.activations if row[0] == feature),
        key=lambda row: (-row[3], row[1], row[2]),
    )
    strengths = {row[:3]: row[3] for row in world.activations}
    names = {0: "prompt", 1: "thinking", 2: "response"}
    result = []
    for rank, (_, sequence, place, strength) in enumerate(hits[:n], 1):
        near = np.flatnonzero(
            (world.sequence_id == sequence) & (np.abs(world.position - place) <= window)
        )
        context = [
            (
                int(world.position[row]),
                int(world.tokens[row]),
                world.texts[world.tokens[row]],
                strengths.get((feature, sequence, int(world.position[row])), 0.0),
                names[int(world.segment[row])],
            )
            for row in near
        ]
        result.append((rank, sequence, place, strength, context))
    return result


def as_tuples(found: TopExamples) -> list[tuple[Any, ...]]:
    return [
        (
            e.rank,
            e.sequence_id,
            e.token_idx,
            e.strength,
            [(t.token_idx, t.token, t.text, t.strength, t.segment) for t in e.context],
        )
        for e in found
    ]


@given(feature=st.integers(0, 23), n=st.integers(0, 90), window=st.integers(0, 45))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_top_is_what_sorting_gives(
    world: World, database: FeatureDB, feature: int, n: int, window: int
) -> None:
    assert as_tuples(database.top(feature, n, window)) == expected_top(world, feature, n, window)


def test_top_of_each_sequence(world: World, database: FeatureDB) -> None:
    found = database.top(12, n=100, per_sequence=2)
    everything = expected_top(world, 12, 10_000, 0)
    seen: dict[int, int] = {}
    expected = []
    for _, sequence, place, *_ in everything:
        seen[sequence] = seen.get(sequence, 0) + 1
        if seen[sequence] <= 2:
            expected.append((sequence, place))
    assert [(e.sequence_id, e.token_idx) for e in found] == expected


def test_top_reads_as_text_and_becomes_tables(database: FeatureDB) -> None:
    found = database.top(np.int64(1), n=3, window=2)  # type: ignore[arg-type]  # any integer
    assert len(found) == 3
    assert found[0].token is not None
    assert found[0].token.text == " Wait"
    assert "« Wait»" in found[0].text
    table = found.to_arrow()
    assert table.column_names == [
        "feature_id", "rank", "sequence_id", "token_idx", "strength", "text", "context",
    ]  # fmt: skip
    assert table.to_pylist()[0]["context"][0].keys() == {
        "token_idx", "token", "text", "strength", "segment",
    }  # fmt: skip
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["rank"].tolist() == [1, 2, 3]
    assert database.top(23).to_arrow().num_rows == 0


@pytest.mark.parametrize("feature", [-1, 24, 10**12])
def test_an_unknown_feature_is_an_error_with_the_range(database: FeatureDB, feature: int) -> None:
    for ask in (database.top, database.feature, database.show):
        with pytest.raises(ValueError, match=rf"no feature {feature} in .* 0 to 23"):
            ask(feature)


def test_arguments_of_top(database: FeatureDB) -> None:
    with pytest.raises(ValueError, match="n is -1; expected at least 0"):
        database.top(1, n=-1)
    with pytest.raises(ValueError, match="window is -1"):
        database.top(1, window=-1)
    with pytest.raises(ValueError, match="per_sequence is 0; expected at least 1"):
        database.top(1, per_sequence=0)
    with pytest.raises(TypeError, match="feature is '1'; expected its id"):
        database.top("1")  # type: ignore[arg-type]  # what is tested


def test_a_feature_at_a_glance(world: World, database: FeatureDB) -> None:
    summary = database.feature(1)
    column = world.dense[:, 1]
    assert summary.count == (column > 0).sum()
    assert summary.max == column.max()
    assert summary.labels[0].statistical
    assert summary.segment_density["thinking"] == pytest.approx(
        (column[world.segment == 1] > 0).mean()
    )
    dead = database.feature(23)
    assert (dead.count, dead.mean, dead.max, dead.clarity) == (0, None, 0.0, 0.0)


# -- search -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(world: World, tmp_path_factory: pytest.TempPathFactory) -> FeatureDB:
    """The same world, with a label by a model beside the counted one."""
    folder = tmp_path_factory.mktemp("labelled")
    path = folder / "f.ddb"
    FeatureDB.build(path, world.write(folder / "codes"), decode=world.decode).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute(ADDED)
    return FeatureDB(path)


def test_search_finds_tokens_wherever_they_stand(labelled: FeatureDB) -> None:
    hits = labelled.search("WAIT")
    assert [(hit.feature_id, hit.matched) for hit in hits[:2]] == [(4, "label"), (1, "token")]
    assert hits[0].model_name == "judge"
    by_feature = {hit.feature_id: hit for hit in hits}
    offsets = {feature: by_feature[feature].token_offset for feature in (1, 2, 3)}
    assert offsets == {1: 0, 2: -1, 3: 1}
    assert by_feature[1].label == labelled.feature(1).labels[0].label
    assert by_feature[1].score == pytest.approx(1.0)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert len(by_feature) == len(hits)
    assert len(labelled.search("WAIT", n=2)) == 2
    assert labelled.search("WAIT").to_arrow().num_rows == len(hits)


def test_search_takes_text_as_it_is(labelled: FeatureDB) -> None:
    assert [hit.feature_id for hit in labelled.search("100% [so]_")] == [4]
    for text in ("100_", "%x", "'; DROP TABLE tokens; --", "stands out", "lift"):
        assert len(labelled.search(text)) == 0, text
    assert any(hit.token == "\x1b[31m" for hit in labelled.search("\x1b"))
    with pytest.raises(ValueError, match="empty"):
        labelled.search("")


def test_a_models_label_comes_before_the_counted_one(labelled: FeatureDB) -> None:
    labels = labelled.feature(4).labels
    assert [label.model_name for label in labels] == ["judge", "statistics"]
    assert labels[0].quality == 0.9


# -- sql, export --------------------------------------------------------------------------------


def test_sql_gives_arrow_and_takes_parameters(world: World, database: FeatureDB) -> None:
    table = database.sql("SELECT count(*) AS n FROM activations WHERE feature_id = ?", [1])
    assert table.to_pylist() == [{"n": int((world.dense[:, 1] > 0).sum())}]


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM tokens",
        "DROP TABLE tokens",
        "CREATE TABLE mine (x INTEGER)",
        "INSERT INTO meta VALUES ('a', 'b')",
        "COPY tokens TO '{folder}/stolen.csv'",
        "SELECT * FROM read_text('{folder}/secret')",
        "ATTACH '{folder}/other.ddb'",
        "SET enable_external_access = true",
        "SELEC 1",
        "SELECT * FROM no_such_table",
        "SELECT 1/0 + 'x'::INTEGER",
    ],
)
def test_sql_refuses_what_does_not_only_read_the_database(
    query: str, database: FeatureDB, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    before = database.path.read_bytes()
    with pytest.raises(ValueError, match="SQL: "):
        database.sql(query.format(folder=tmp_path))
    assert database.path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]
    assert database.sql("SELECT count(*) FROM tokens").num_rows == 1


_LOG = "enable_logging(storage='file', storage_config={'path': '{folder}/log'})"


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        (f"CALL {_LOG}; SELECT 1", "2 statements; expected one"),
        ("SELECT 1; SELECT 2", "2 statements; expected one"),
        (f"CALL {_LOG}", "of the kind CALL; expected one that reads"),
        ("SET threads = 1", "of the kind SET; expected one that reads"),
        ("PRAGMA table_info('tokens')", "of the kind PRAGMA; expected one that reads"),
        (f"SELECT * FROM {_LOG}", "(locked|does not exist)"),
        (f"EXPLAIN ANALYZE CALL {_LOG}", "(locked|does not exist)"),
    ],
)
def test_sql_changes_no_setting(
    query: str, problem: str, database: FeatureDB, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"SQL: .*{problem}"):
        database.sql(query.replace("{folder}", str(tmp_path)))
    # With logging on, this one ended the process.
    assert database.sql("SELECT count(*) FROM tokens").num_rows == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "query",
    [
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a;",
        "FROM meta",
        "VALUES (1)",
        "SHOW TABLES",
        "DESCRIBE tokens",
        "SUMMARIZE meta",
        "EXPLAIN SELECT * FROM tokens",
        "PIVOT meta ON key USING count(*)",
    ],
)
def test_sql_takes_every_statement_that_reads(query: str, database: FeatureDB) -> None:
    assert database.sql(query).num_rows > 0


def test_export_writes_every_table(database: FeatureDB, tmp_path: Path) -> None:
    files = database.export(tmp_path / "parquet")
    assert sorted(file.stem for file in files) == sorted(database.tables)
    for file in files:
        stored = database.sql(f"SELECT * FROM {file.stem}")
        assert pq.read_table(file).to_pylist() == stored.to_pylist(), file
    files[0].write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=files[0].name):
        database.export(tmp_path / "parquet")
    assert files[0].read_bytes() == b"mine"
    database.export(tmp_path / "parquet", overwrite=True)
    assert pq.read_table(files[0]).num_rows
    assert len(list((tmp_path / "parquet").iterdir())) == len(files)


class _StopNow(Exception):
    """Raised by a signal's handler, as ctrl-c raises KeyboardInterrupt."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_a_signal_stops_a_query_at_once(database: FeatureDB) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _StopNow

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(_StopNow):  # noqa: PT012  # nor may it come before
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            # A million times a million rows: days.
            database.sql(
                "SELECT sum(sqrt(a.range) * b.range) FROM range(1000000) a, range(1000000) b"
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(database.top(1)) == 10


def test_several_threads_may_ask(database: FeatureDB) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ask: Callable[[int], TopExamples] = lambda feature: database.top(feature % 24)  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(48))) == [ask(feature) for feature in range(48)]
