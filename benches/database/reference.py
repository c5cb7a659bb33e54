"""The tables of one pass in plain SQL, each query as quick as DuckDB was found to do it."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa

from database.data import activation_batches
from r1sae_fast.features.stream import ArrowStream
from r1sae_fast.shards import CodeShards

PAIR_ROWS = 20_000
"""Pairs are counted on so many tokens; their time grows with the tokens."""


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


_RANKED = "(PARTITION BY feature_id ORDER BY strength DESC, sequence_id, token_idx)"

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
    "intervals": f"""
        SELECT * FROM (
            SELECT *, ntile(5) OVER {_RANKED} AS quantile FROM activations)
        QUALIFY row_number() OVER (PARTITION BY feature_id, quantile
            ORDER BY hash(sequence_id, token_idx, feature_id)) <= 5""",
    "negatives": """
        WITH drawn AS (
            SELECT f.feature_id, t.sequence_id, t.token_idx FROM
            (SELECT feature_id, unnest(range(50)) AS draw FROM
             (SELECT DISTINCT feature_id FROM activations)) f
            JOIN (SELECT row_number() OVER () - 1 AS row, * FROM tokens) t
            ON t.row = hash(f.feature_id, f.draw) % (SELECT count(*) FROM tokens))
        SELECT d.* FROM drawn d ANTI JOIN activations a
        ON a.feature_id = d.feature_id AND a.sequence_id = d.sequence_id
        AND a.token_idx BETWEEN d.token_idx - 16 AND d.token_idx + 16""",
    "tokens": """
        WITH here AS (
            SELECT feature_id, token, count(*) AS n, sum(strength) AS weight
            FROM activations JOIN tokens USING (sequence_id, token_idx) GROUP BY ALL),
        base AS (SELECT token, count(*) AS n FROM tokens GROUP BY ALL)
        SELECT feature_id, token, here.n, weight, here.n / base.n AS lift FROM here
        JOIN base USING (token)
        QUALIFY row_number() OVER (PARTITION BY feature_id ORDER BY weight * log2(lift) DESC) <= 10
        """,
}
"""Tokens only where the feature fires: the core counts them before and after it too."""


def pairs(rows: int) -> str:
    """The twenty best partners of each feature, on the first ``rows`` tokens of 1,024 a text."""
    return f"""
        WITH few AS (SELECT * FROM activations
                     WHERE sequence_id * 1024 + token_idx < {rows}),
        each AS (SELECT feature_id, count(*) AS n FROM few GROUP BY ALL),
        both AS (
            SELECT a.feature_id AS a, b.feature_id AS b, count(*) AS n
            FROM few a JOIN few b USING (sequence_id, token_idx)
            WHERE a.feature_id <> b.feature_id GROUP BY ALL HAVING count(*) >= 5)
        SELECT a, b, both.n, log2(both.n * {rows}::DOUBLE / (x.n * y.n)) AS pmi FROM both
        JOIN each x ON x.feature_id = a JOIN each y ON y.feature_id = b
        QUALIFY row_number() OVER (PARTITION BY a ORDER BY both.n / y.n DESC) <= 20"""
