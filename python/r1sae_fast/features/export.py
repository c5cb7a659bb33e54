"""Feature databases as parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from r1sae_fast.atomic import replacing
from r1sae_fast.features.execute import interruptible
from r1sae_fast.features.opening import damaged
from r1sae_fast.features.stream import arrow_reader


def export(
    connection: duckdb.DuckDBPyConnection,
    database: Path,
    tables: Sequence[str],
    folder: Path,
    *,
    overwrite: bool,
) -> list[Path]:
    """Writes ``folder/<table>.parquet`` for each table, in batches; returns the files."""
    files = [folder / f"{table}.parquet" for table in tables]
    present = [file for file in files if file.exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"{present[0]}: exists already; choose another folder, or pass overwrite=True "
            "(--overwrite)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for table, file in zip(tables, files, strict=True):
        try:
            rows = connection.sql(f'SELECT * FROM "{table}"')
            reader = interruptible(connection, partial(arrow_reader, rows))
        except duckdb.Error as error:
            raise damaged(database, error) from None
        with (
            replacing(file) as temporary,
            pq.ParquetWriter(temporary, reader.schema, compression="zstd") as writer,
        ):
            for batch in _batches(reader, database):
                writer.write_batch(batch)
    return files


def _batches(reader: pa.RecordBatchReader, database: Path) -> Iterator[pa.RecordBatch]:
    """The batches; an error of theirs is the database's (Arrow makes an OSError of it)."""
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (OSError, pa.ArrowException, duckdb.Error) as error:
            raise damaged(database, error) from None
        yield batch
