"""The tables of one pass in plain SQL, each query as quick as DuckDB was found to do it."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa

from database.data import activation_batches
from r1sae_fast.features.stream import ArrowStream
from r1sae_fast.shards import CodeShards

PAIR_ROWS = 20_000
"""Pairs are counted on so many tokens: with the tokens grow the time and the pairs to be kept."""


def prepare(path: Path, codes: CodeShards) -> None:
    """Activations in the order of the text, and tokens with their segments."""
    places = {"sequence_id": pa.int64(), "token_idx": pa.int32(), "token": pa.int32(),
              "segment": pa.uint8()}  # fmt: skip
    active = {"feature_id": pa.int32(), "sequence_id": pa.int64(), "token_idx": pa.int32(),
              "strength": pa.float32()}  # fmt: skip

    def tokens():
        for batch in codes.iter_batches(1 << 16):
            columns = batch.sequence_id, batch.position, batch.tokens, batch.segment
            yield [pa.array(column.numpy()) for column in columns]

    with duckdb.connect(str(path)) as connection:
        with ArrowStream(connection, places, tokens()) as name:
            connection.execute(f"CREATE TABLE tokens AS SELECT * FROM {name}")
        with ArrowStream(connection, active, activation_batches(codes)) as name:
            connection.execute(f"CREATE TABLE activations AS SELECT * FROM {name}")


QUERIES = {
    "counts": """
        SELECT feature_id, count(*), avg(strength), max(strength) FROM activations GROUP BY 1""",
    "histogram": """
        SELECT feature_id, least(greatest(floor(log2(strength) * 4) + 48, 0), 95)::INTEGER AS bin,
        count(*) FROM activations GROUP BY ALL""",
    "segments and positions": """
        SELECT feature_id, segment, CASE WHEN token_idx = 0 THEN 0
        ELSE 1 + floor(log2(token_idx))::INTEGER END AS bin, count(*)
        FROM activations JOIN tokens USING (sequence_id, token_idx) GROUP BY ALL""",
    "examples": """
        SELECT feature_id, unnest(
            max_by({'s': strength, 'q': sequence_id, 't': token_idx}, strength, 20),
            recursive := true)
        FROM (SELECT feature_id, sequence_id, max(strength) AS strength,
              arg_max(token_idx, strength) AS token_idx FROM activations GROUP BY ALL)
        GROUP BY feature_id""",
    # Numbering by windows (ntile, row_number) takes twice as long.
    "intervals": """
        WITH cuts AS (
            SELECT feature_id, quantile_disc(strength, [0.2, 0.4, 0.6, 0.8]) AS q
            FROM activations GROUP BY 1),
        inside AS (
            SELECT a.feature_id, a.strength, a.rowid AS row, (strength > q[1])::INT
            + (strength > q[2])::INT + (strength > q[3])::INT + (strength > q[4])::INT AS quantile
            FROM activations a JOIN cuts USING (feature_id))
        SELECT feature_id, quantile, min(strength) AS low, max(strength) AS high, count(*) AS n,
        min_by(row, hash(row), 5) AS drawn FROM inside GROUP BY ALL""",
    # A join by ranges, or ASOF, takes a hundred times as long.
    "negatives": """
        WITH drawn AS (
            SELECT feature_id, sequence_id, token_idx FROM
            (SELECT feature_id, hash(feature_id, draw) % (SELECT count(*) FROM tokens) AS row FROM
             (SELECT feature_id, unnest(range(50)) AS draw FROM
              (SELECT DISTINCT feature_id FROM activations)))
            JOIN (SELECT *, row_number() OVER () - 1 AS row FROM tokens) USING (row)),
        slots AS (SELECT *, token_idx // 32 AS slot FROM activations),
        near AS (
            SELECT DISTINCT d.feature_id, d.sequence_id, d.token_idx FROM
            (SELECT *, unnest([(token_idx - 16) // 32, (token_idx + 16) // 32]) AS slot
             FROM drawn) d JOIN slots a ON a.feature_id = d.feature_id
            AND a.sequence_id = d.sequence_id AND a.slot = d.slot
            AND abs(a.token_idx - d.token_idx) <= 16)
        SELECT * FROM drawn ANTI JOIN near USING (feature_id, sequence_id, token_idx)""",
    "tokens": """
        WITH here AS (
            SELECT feature_id, token, count(*) AS n, sum(strength) AS weight
            FROM activations JOIN tokens USING (sequence_id, token_idx) GROUP BY ALL),
        base AS (SELECT token, count(*) AS n FROM tokens GROUP BY ALL)
        SELECT feature_id, max_by(
            {'t': token, 'n': here.n, 'w': weight, 'l': here.n / base.n},
            weight * log2(here.n / base.n), 10)
        FROM here JOIN base USING (token) GROUP BY feature_id""",
}
"""Tokens only where the feature fires: the core counts them before and after it too."""


def pairs(rows: int) -> str:
    """The twenty best partners of each feature, on the first ``rows`` tokens of 1,024 a text."""
    return f"""
        WITH few AS (SELECT feature_id, sequence_id * 1024 + token_idx AS row FROM activations
                     WHERE sequence_id * 1024 + token_idx < {rows}),
        each AS (SELECT feature_id, count(*) AS n FROM few GROUP BY ALL),
        half AS (
            SELECT a.feature_id AS a, b.feature_id AS b, count(*)::INTEGER AS n
            FROM few a JOIN few b ON a.row = b.row AND a.feature_id < b.feature_id
            GROUP BY ALL HAVING count(*) >= 5),
        met AS (SELECT a, b, n FROM half UNION ALL SELECT b, a, n FROM half)
        SELECT a, max_by(
            {{'b': b, 'n': met.n, 'pmi': log2(met.n * {rows}::DOUBLE / (x.n * y.n))}},
            met.n / y.n, 20)
        FROM met JOIN each x ON x.feature_id = a JOIN each y ON y.feature_id = b GROUP BY a"""
