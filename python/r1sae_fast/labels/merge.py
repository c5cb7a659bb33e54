"""Journal to database: in one transaction, or, where others read it, into a copy that replaces it.

Merging the same journal twice leaves what merging it once does: a label takes the place of the
one with the same feature, model and prompt version. So the journal is cut only after the database
has its labels, and a crash between the two does no harm.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from r1sae_fast.atomic import replacing
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.attaching import connect_to_write
from r1sae_fast.features.execute import execute
from r1sae_fast.features.lock import building_lock, require_not_open
from r1sae_fast.features.schema import TABLES
from r1sae_fast.features.stream import ArrowStream
from r1sae_fast.labels.journal import Finished, Journal, fingerprint, journal_path

_CONFIG: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
_SPARE = 1 << 30  # bytes of disk that a copy leaves free


def labelling_lock(database: Path) -> Any:
    """Held by who labels a database, or merges."""
    return building_lock(journal_path(database), "labelling this database")


def merge_labels(path: str | Path) -> int:
    """Puts what ``r1sae label`` left in its journal into the database; gives how many labels.

    Raises:
        FileNotFoundError: no such database.
        DatabaseError: the database is being written or labelled, or read by others while the disk
            has no room for a copy; the journal stays.
        LabelError: a journal of another database.
    """
    path = Path(path).resolve()
    require_not_open(path)
    with labelling_lock(path):
        with FeatureDB(path) as db:
            mark = fingerprint(db)
        if not journal_path(path).exists():
            return 0
        with Journal(journal_path(path), mark) as journal:
            pass
        return merge(path, journal)


def merge(path: Path, journal: Journal) -> int:
    """Merges a closed journal, and cuts it. The caller holds the lock."""
    finished = list(journal.finished.values())
    if finished:
        with building_lock(path):
            _into(path, finished)
    journal.rewrite([entry.key for entry in finished])
    return len(finished)


def _into(path: Path, finished: Sequence[Finished]) -> None:
    try:
        connection = connect_to_write(path, _CONFIG)
    except duckdb.Error as error:
        if "lock" not in str(error):
            raise DatabaseError(f"{path}: labels can't be merged: {error}") from None
    else:
        _write(path, connection, finished)
        return
    try:
        # Only where nobody writes; and nobody can as long as this is open.
        reading = duckdb.connect(str(path), read_only=True)
    except duckdb.Error as error:
        raise DatabaseError(
            f"{path}: another program is writing it ({error}); the labels are kept in "
            f"{journal_path(path)} and merged by the next r1sae label, or by r1sae label --merge"
        ) from None
    try:
        _into_copy(path, finished)
    finally:
        reading.close()


def _into_copy(path: Path, finished: Sequence[Finished]) -> None:
    """Readers go on reading the old file; whoever opens the database then gets the new one."""
    size = path.stat().st_size
    free = shutil.disk_usage(path.parent).free
    if path.with_name(path.name + ".wal").exists():
        raise DatabaseError(
            f"{path}: others are reading it, and a write to it was killed before; the labels are "
            f"kept in {journal_path(path)}: close the database elsewhere, then run r1sae label "
            "--merge"
        )
    if free < size + _SPARE:
        raise DatabaseError(
            f"{path}: others are reading it, and a copy of {size / 1e9:.1f} GB to write to needs "
            f"more than the {free / 1e9:.1f} GB that are free; the labels are kept in "
            f"{journal_path(path)}: close the database elsewhere, then run r1sae label --merge"
        )
    try:
        with replacing(path) as temporary:
            shutil.copyfile(path, temporary)
            _write(path, connect_to_write(temporary, _CONFIG), finished)
    except OSError as error:
        raise DatabaseError(
            f"{path}: labels can't be merged: {error}; they are kept in {journal_path(path)}"
        ) from error


def _write(path: Path, connection: duckdb.DuckDBPyConnection, finished: Sequence[Finished]) -> None:
    try:
        with connection:
            execute(connection, "BEGIN")
            _tables(connection)
            for table, columns in _COLUMNS.items():
                _replace(connection, table, columns, _rows(finished, table))
            execute(connection, "COMMIT")
            execute(connection, "CHECKPOINT")
    except duckdb.Error as error:
        raise DatabaseError(
            f"{path}: labels can't be merged: {error}; they are kept in {journal_path(path)}"
        ) from None


def _tables(connection: duckdb.DuckDBPyConnection) -> None:
    for table in _COLUMNS:
        execute(connection, f"CREATE TABLE IF NOT EXISTS {table} ({TABLES[table]})")


_KEY = {"feature_id": pa.int32(), "model_name": pa.string(), "prompt_version": pa.string()}
_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "autointerp": {**_KEY, "label": pa.string()},
    "scores": {
        **_KEY,
        "scorer": pa.string(),
        "judge": pa.string(),
        "balanced_accuracy": pa.float64(),
        "f1": pa.float64(),
        "precision": pa.float64(),
        "recall": pa.float64(),
        "true_positives": pa.int32(),
        "false_negatives": pa.int32(),
        "true_negatives": pa.int32(),
        "false_positives": pa.int32(),
        "unanswered": pa.int32(),
    },
    "label_usage": {
        **_KEY,
        "requests": pa.int32(),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "cost": pa.float64(),
    },
}


def _rows(finished: Sequence[Finished], table: str) -> list[dict[str, object]]:
    """A table's rows, as columns by name; what is an attribute is named as its column."""
    rows: list[dict[str, object]] = []
    for entry in finished:
        who = dict(zip(_KEY, entry.key, strict=True))
        if table == "autointerp":
            rows.append({**who, "label": entry.label})
        elif table == "label_usage":
            rows.append({**who, **asdict(entry.usage)})
        else:
            for score in entry.scores:
                figures = {
                    "balanced_accuracy": score.balanced_accuracy,
                    "f1": score.f1,
                    "precision": score.precision,
                    "recall": score.true_positive_rate,
                }
                rows.append({**who, **asdict(score), **figures})
    return rows


def _replace(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    columns: dict[str, pa.DataType],
    rows: Sequence[dict[str, object]],
) -> None:
    """Puts the rows in place of those with the same feature, model and prompt version."""
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in columns.items()]
    with ArrowStream(connection, columns, iter([arrays])) as name:
        execute(connection, f"CREATE OR REPLACE TEMP TABLE merged AS SELECT * FROM {name}")
    execute(
        connection,
        f"DELETE FROM {table} t USING merged m WHERE "
        + " AND ".join(f"t.{key} = m.{key}" for key in _KEY),
    )
    names = ", ".join(columns)
    execute(connection, f"INSERT INTO {table} ({names}) SELECT {names} FROM merged")
