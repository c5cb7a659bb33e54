"""Files in the schemas of Goodfire's releases, made of the same small world of rows."""

import csv
import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

Row = tuple[Any, ...]

FEATURES, SEQUENCES, LENGTH = 40, 30, 40
TEXTS = (" the", " Wait", ".", "\n\n", "<｜begin▁of▁sentence｜>", ",", "\x1b[31m", "é", '"', "'")

_LABELS = "feature_id, label, quality, interestingness, model_name, prompt_version"


def _rows() -> tuple[list[Row], list[Row], list[Row]]:
    draw = np.random.default_rng(7)
    tokens = [
        (s, p, t, TEXTS[t])
        for s in range(SEQUENCES)
        for p, t in enumerate(draw.integers(0, len(TEXTS), LENGTH).tolist())
    ]
    # Token-major, as released. No two strengths are equal, so that every order is one.
    strengths = iter((draw.permutation(SEQUENCES * LENGTH * 4) + 1).astype(np.float32) / 4096)
    activations = [
        (feature, s, p, float(next(strengths)))
        for s, p, *_ in tokens
        for feature in sorted(draw.choice(FEATURES - 3, 4, replace=False).tolist())
    ]
    labels = [
        (f, f"Label {f}, \"quoted\"\nover lines <b>é" if f % 7 == 0 else f"label {f}", f / 64, 0.5,
         "claude-3-7-sonnet-latest", "v0-dev")
        for f in range(FEATURES) if f != 2
    ]  # fmt: skip
    return tokens, activations, labels


@dataclass
class Release:
    """The rows, and ways to write them."""

    tokens: list[Row] = field(default_factory=list)
    activations: list[Row] = field(default_factory=list)
    labels: list[Row] = field(default_factory=list)

    def as_duckdb(self, path: Path) -> Path:
        """``logic.ddb`` as it is now; its labels lie elsewhere."""
        with duckdb.connect(str(path)) as connection:
            connection.execute(
                "CREATE TABLE tokens (sequence_id BIGINT, token_idx BIGINT, token BIGINT, "
                "decoded_token VARCHAR)"
            )
            connection.execute(
                "CREATE TABLE activations (feature_id BIGINT, sequence_id BIGINT, "
                "token_idx BIGINT, strength FLOAT)"
            )
            self._insert(connection, "tokens", self.tokens)
            self._insert(connection, "activations", self.activations)
        return path

    @staticmethod
    def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: list[Row]) -> None:
        columns = [pa.array(column) for column in zip(*rows, strict=True)]
        connection.register("rows", pa.table(columns, [str(i) for i in range(len(columns))]))
        connection.execute(f"INSERT INTO {table} SELECT * FROM rows")
        connection.unregister("rows")

    def sqlite_labels(self, path: Path) -> Path:
        """``autointerp.db``, with the columns of the first release."""
        with closing(sqlite3.connect(path)) as file:
            file.execute(
                "CREATE TABLE autointerp (feature_id INTEGER, label TEXT, seqs TEXT, indices TEXT,"
                "quality REAL, interestingness REAL, model_name TEXT, prompt_version TEXT)"
            )
            file.executemany(
                "INSERT INTO autointerp VALUES (?, ?, '[]', '[]', ?, ?, ?, ?)", self.labels
            )
            file.commit()
        return path

    def csv_labels(self, path: Path) -> Path:
        """``autointerp.csv``."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_LABELS.split(", "))
            writer.writerows(self.labels)
        return path

    def trio(self, folder: Path) -> Path:
        """The three SQLite files of the first release."""
        folder.mkdir(exist_ok=True)
        self.sqlite_labels(folder / "autointerp.db")
        with closing(sqlite3.connect(folder / "tokens.db")) as file:
            file.execute(
                "CREATE TABLE tokens (sequence_id INTEGER, token_idx INTEGER, token_int INTEGER, "
                "token_text TEXT)"
            )
            file.executemany("INSERT INTO tokens VALUES (?, ?, ?, ?)", self.tokens)
            file.commit()
        with closing(sqlite3.connect(folder / "feature_activations.db")) as file:
            file.execute(
                "CREATE TABLE feature_activations (feature_id INTEGER, sequence_id INTEGER, "
                "token_idx INTEGER, strength REAL)"
            )
            file.executemany(
                "INSERT INTO feature_activations VALUES (?, ?, ?, ?)", self.activations
            )
            file.commit()
        return folder

    def around_the_strongest(self, feature: int, n: int, window: int) -> set[Row]:
        """What the notebook's last query gives, by plain Python: label, place, token around it."""
        label = next(row[1] for row in self.labels if row[0] == feature)
        mine = sorted((a for a in self.activations if a[0] == feature), key=lambda a: -a[3])
        return {
            (feature, label, s, top, strength, p, text)
            for _, s, top, strength in mine[:n]
            for sequence, p, _, text in self.tokens
            if sequence == s and abs(p - top) <= window
        }


@pytest.fixture(scope="session")
def release() -> Release:
    return Release(*_rows())


def notebook_query(feature: int, n: int, window: int, schema: str = "ds.") -> str:
    """What the release's notebook asks, in words of our own."""
    return f"""
        WITH strongest AS (
            SELECT l.feature_id, l.label, a.sequence_id, a.token_idx, a.strength
            FROM autointerp l JOIN {schema}activations a ON l.feature_id = a.feature_id
            WHERE l.feature_id = {feature} ORDER BY a.strength DESC LIMIT {n})
        SELECT s.feature_id, s.label, s.sequence_id, s.token_idx AS top_act_token_idx, s.strength,
            t.token_idx AS token_idx, t.decoded_token
        FROM {schema}tokens t JOIN strongest s ON t.sequence_id = s.sequence_id
        WHERE abs(t.token_idx - s.token_idx) <= {window}"""


@pytest.fixture(scope="session")
def ask() -> Any:
    """The notebook's query on an open database, as a set of rows."""

    def run(db: Any, feature: int, n: int, window: int, schema: str = "ds.") -> set[Row]:
        rows = db.sql(notebook_query(feature, n, window, schema)).to_pylist()
        assert json.dumps(rows)  # plain values
        found = {tuple(row.values()) for row in rows}
        assert len(found) == len(rows)
        return found

    return run
