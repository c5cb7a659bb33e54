"""Feature databases as parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from r1sae_fast.atomic import replacing
from r1sae_fast.features.execute import interruptible
from r1sae_fast.features.stream import arrow_reader


def export(
    connection: duckdb.DuckDBPyConnection, tables: Sequence[str], folder: Path, *, overwrite: bool
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
        rows = connection.sql(f'SELECT * FROM "{table}"')
        reader = interruptible(connection, partial(arrow_reader, rows))
        with (
            replacing(file) as temporary,
            pq.ParquetWriter(temporary, reader.schema, compression="zstd") as writer,
        ):
            for batch in reader:
                writer.write_batch(batch)
    return files
