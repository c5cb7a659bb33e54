"""Importing a released database: sorted by feature, so that any feature is one short read.

Released files lie in the order of the text: every question about a feature reads a whole column.
The core sorts by way of a file of 12 bytes an activation (:mod:`.clustering`), and counts what is
kept of each feature on the way. It wants each activation once, at a token that is there.

Any other file, and one whose activations the disk has no room for, is sorted by DuckDB, which
spills beside the destination. A sort of few rows at a time is quicker than one that spills (and
needs no disk), a scan is thirty times quicker than either; so the features are sorted in a few
ranges, as many as fit into memory, at most :data:`_PASSES` while the disk has room for what spills.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from r1sae_fast.errors import DatabaseError
from r1sae_fast.examples import histogram_edges
from r1sae_fast.features.clustering import largest_needs
from r1sae_fast.features.execute import execute
from r1sae_fast.features.import_files import SOURCE, attached, duckdb_memory, fingerprint
from r1sae_fast.features.import_sort import CoreSort, drop_tables
from r1sae_fast.features.labels import add_labels
from r1sae_fast.features.new_file import NewFile, new_file
from r1sae_fast.features.places import PLACE, TokenPlaces
from r1sae_fast.features.released.connect import registered
from r1sae_fast.features.released.files import duckdb_tables
from r1sae_fast.features.released.labels import read_labels
from r1sae_fast.features.released.layout import require_tables
from r1sae_fast.features.released.recognise import Labels, Source, SqliteSource, recognise
from r1sae_fast.features.schema import FORMAT, POSITION_EDGES, TABLES, VERSION
from r1sae_fast.progress import progress_bar
from r1sae_fast.r1.stream.sizes import show_size

_PASSES = 16
# Measured with DuckDB 2.0: what a row takes while it is sorted, and in the file.
_SORT_BYTES = 96
_FILE_BYTES = 7
_MOST_FEATURES = 1 << 24  # that the core counts
_ORDER = "feature_id, sequence_id, token_idx, strength DESC"

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    path: Path
    tokens: int
    activations: int
    features: int
    labels: int
    passes: int


def import_database(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    labels: Labels = None,
    *,
    max_memory: int = 2 << 30,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Imported:
    """Writes a database with the same rows, sorted by feature, then by place.

    ``destination`` is there whole or not at all: it is written beside its place
    (``<destination>.tmp``, ``.work.tmp``, ``.spill.tmp``), synced and renamed. An import that is
    killed leaves what was there before, and the next one of the same file goes on where it was.
    Statistics (``features``, ``examples`` and so on) are made where the core sorts; counted labels,
    where the source has none at all.

    Args:
        source: whatever :meth:`FeatureDB.open` takes; SQLite files of any size.
        destination: the file to write.
        labels: as for :meth:`FeatureDB.open`; of a source that has labels, those are taken.
        max_memory: bytes that this process may use in all, what it uses already included.
        overwrite: whether a file at ``destination`` may be replaced.
        progress: a bar on stderr; default: when stderr is a terminal.

    Raises:
        FileExistsError: ``destination`` exists and ``overwrite`` is false.
        FileNotFoundError: no such source, or no folder for the destination.
        DatabaseError: the source is unknown, damaged or has a row without a feature; the disk has
            too little room (checked first) or ran full.
        ValueError: too small a cap, or a destination that is the source.
    """
    destination = Path(destination)
    found = recognise(Path(source), labels)
    _require_destination(found, destination, overwrite)
    memory = duckdb_memory(max_memory)
    labelled = None if found.labels is None else read_labels(found.labels)
    key = json.dumps([VERSION, memory, fingerprint(found)])
    config = {
        "memory_limit": f"{memory >> 10}KiB",
        "threads": str(min(os.cpu_count() or 1, max(1, memory >> 28))),
    }
    with (
        new_file(destination, key, config, "import") as file,
        attached(file.connection, found, destination),
    ):
        tables = duckdb_tables(file.connection, SOURCE)
        require_tables(found.path, tables)
        if "meta" in tables and "features" in tables:
            raise ValueError(
                f"{found.path}: was built here, and is sorted by feature already; open it as it is"
            )
        return _Import(file, found, destination, tables, labelled, memory).run(progress)


class _Import:
    """One import, into a file that is open, from ``ds``."""

    def __init__(
        self,
        file: NewFile,
        source: Source,
        destination: Path,
        tables: dict[str, dict[str, str]],
        labels: pa.Table | None,
        memory: int,
    ) -> None:
        self._file = file
        self._connection = file.connection
        self._source = source
        self._destination = destination
        self._tables = tables
        self._labels = labels
        self._memory = memory
        self._counted: TokenPlaces | None = None  # where the core sorted

    def run(self, progress: bool | None) -> Imported:
        """Fills the tables; the rows are counted before and after."""
        feature, count, plain = self._count()
        tokens = self._rows("_source.main.tokens")
        activations = int(count.sum())
        ranges = self._ranges(feature, count, tokens)
        with progress_bar(
            "importing", tokens + 2 * activations, unit="rows", shown=progress
        ) as advance:
            parts = self._token_ranges(tokens)
            passes = None
            if plain and self._has_room(activations, tokens):
                passes = self._sort(feature, count, parts, advance)
            if passes is None:
                passes = len(ranges)
                self._copy_activations(feature, count, ranges, activations, advance)
            self._copy_tokens(parts, 2 * activations, tokens, advance)
        for table, rows in (("tokens", tokens), ("activations", activations)):
            written = self._rows(table)
            if written != rows:
                raise DatabaseError(
                    f"{self._source.path}: {rows:,} rows of {table} were counted, but {written:,} "
                    "read; does another program write the file? Import it again"
                )
        with self._file.step("labels"):
            labels = self._copy_labels()
            d_sae = int(feature[-1]) + 1 if len(feature) else 0
            if labels:
                query = "SELECT max(feature_id) FROM autointerp"
                d_sae = max(d_sae, int(execute(self._connection, query)[0][0]) + 1)
            if self._counted is not None:
                if not labels:
                    create = f"CREATE OR REPLACE TABLE autointerp ({TABLES['autointerp']})"
                    execute(self._connection, create)
                distinct = len(self._counted.tokens)
                add_labels(self._connection, tokens, d_sae, distinct, clarity_only=labels > 0)
            self._write_meta(d_sae, tokens)
            # The release's notebook has these tables in a schema of this name.
            execute(self._connection, "CREATE SCHEMA IF NOT EXISTS ds")
            for table in ("tokens", "activations"):
                execute(
                    self._connection,
                    f"CREATE OR REPLACE VIEW ds.{table} AS SELECT * FROM main.{table}",
                )
        return Imported(self._destination, tokens, activations, len(feature), labels, passes)

    def _count(self) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """Every feature that is active, and how often; whether all strengths are positive."""
        rows = execute(
            self._connection,
            "SELECT feature_id::BIGINT, count(*), "
            "bool_and(coalesce(strength > 0 AND isfinite(strength), false)) "
            "FROM _source.main.activations GROUP BY 1 ORDER BY 1",
        )
        for feature, rows_of_it, _ in rows:
            if feature is None or not 0 <= feature < 1 << 31:
                raise DatabaseError(
                    f"{self._source.path}: {rows_of_it:,} rows of activations are of feature "
                    f"{feature}; expected an id of at least 0"
                )
        table = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1], all(row[2] for row in rows)

    def _has_room(self, activations: int, tokens: int) -> bool:
        """Whether the disk has room for the core's sort."""
        size = activations * _FILE_BYTES + self._token_bytes(tokens)
        free = shutil.disk_usage(self._destination.parent).free
        return free > 1.05 * size + 12 * activations + PLACE.itemsize * tokens

    def _sort(
        self,
        feature: NDArray[np.int64],
        count: NDArray[np.int64],
        parts: list[str],
        advance: Advance,
    ) -> int | None:
        """Sorts by the core; in how many parts, or None where the rows are not such as it wants."""
        if len(feature) and feature[-1] >= _MOST_FEATURES:
            return None
        if largest_needs(count) > self._memory:
            return None
        counts = np.zeros(int(feature[-1]) + 1 if len(feature) else 0, dtype=np.uint64)
        counts[feature] = count
        sort = CoreSort(self._file, counts, self._memory)
        places = sort.places(parts)
        if places is None or not sort.scatter(places, advance):
            return None
        done = int(count.sum())
        passes = sort.load(places, lambda rows: advance(done + rows))
        self._counted = None if passes is None else places
        return passes

    def _ranges(
        self, feature: NDArray[np.int64], count: NDArray[np.int64], tokens: int
    ) -> list[tuple[int, int]]:
        """Ranges of features ``[start, end)`` that are sorted one after another; checks the disk.

        Raises:
            DatabaseError: the disk has no room for the file, or none for sorting it.
        """
        rows = int(count.sum())
        in_memory = max(1, self._memory // (2 * _SORT_BYTES))
        wanted = max(rows, tokens)
        size = rows * _FILE_BYTES + self._token_bytes(tokens)
        free = shutil.disk_usage(self._destination.parent).free
        room = free - int(size * 1.05)
        largest = int(count.max()) if len(count) else 0
        rows_a_pass = max(in_memory, -(-wanted // _PASSES))
        if rows_a_pass > in_memory:  # it spills: no more than there is room for
            rows_a_pass = max(in_memory, min(rows_a_pass, room // (2 * _SORT_BYTES)))
        spill = 0 if max(rows_a_pass, largest) <= in_memory else largest * _SORT_BYTES
        if room < spill:
            raise DatabaseError(
                f"{self._destination.parent}: {show_size(free)} are free; the database takes about "
                f"{show_size(size)}, and sorting it {show_size(spill)} more; make room, or choose "
                "a destination on another disk"
            )
        if not len(feature):
            return []
        # The range of a feature by the rows up to its own.
        part = (np.cumsum(count) - 1) // rows_a_pass
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        edges = [*feature[starts].tolist(), int(feature[-1]) + 1]
        return list(pairwise(edges))

    def _token_bytes(self, tokens: int) -> int:
        text = execute(
            self._connection,
            "SELECT coalesce(avg(strlen(decoded_token)), 0) FROM "
            "(SELECT decoded_token FROM _source.main.tokens LIMIT 100000)",
        )[0][0]
        return int(tokens * (6 + float(text)))

    def _token_ranges(self, tokens: int) -> list[str]:
        """Queries that give all tokens in their order, each what is sorted in memory."""
        low, high = execute(
            self._connection,
            "SELECT min(sequence_id), max(sequence_id) FROM _source.main.tokens",
        )[0]
        if low is None:
            return []
        segment = "segment" if "segment" in self._tables["tokens"] else "NULL AS segment"
        rows_a_pass = max(1, self._memory // (4 * _SORT_BYTES))
        # By sequence: in the released order a range reads its own part of the file alone.
        passes = min(-(-tokens // rows_a_pass), int(high) - int(low) + 1)
        edges = [int(low) + (int(high) + 1 - int(low)) * i // passes for i in range(passes + 1)]
        return [
            f"SELECT sequence_id, token_idx, token, decoded_token, {segment} "
            f"FROM _source.main.tokens WHERE sequence_id >= {start} AND sequence_id < {end} "
            "ORDER BY sequence_id, token_idx"
            for start, end in pairwise(edges)
        ]

    def _copy_tokens(self, parts: list[str], done: int, tokens: int, advance: Advance) -> None:
        """Fills ``tokens``, last of all long tables: in short row groups."""
        self._file.shorten_row_groups()
        create = f"CREATE TABLE IF NOT EXISTS tokens ({TABLES['tokens']})"
        execute(self._connection, create)
        for i, query in enumerate(parts):
            if self._file.done(f"tokens {i}"):
                continue
            with self._file.step(f"tokens {i}"):
                self._run(
                    f"INSERT INTO tokens {query}",
                    advance,
                    done + tokens * i / len(parts),
                    done + tokens * (i + 1) / len(parts),
                )

    def _copy_activations(
        self,
        feature: NDArray[np.int64],
        count: NDArray[np.int64],
        ranges: list[tuple[int, int]],
        done: int,
        advance: Advance,
    ) -> None:
        if not self._file.done("by DuckDB"):
            with self._file.step("by DuckDB"):
                drop_tables(self._connection)
                execute(self._connection, f"CREATE TABLE activations ({TABLES['activations']})")
        for start, end in ranges:
            low, high = np.searchsorted(feature, [start, end])
            rows = int(count[low:high].sum())
            step = f"range {start} to {end}"
            if not self._file.done(step):
                with self._file.step(step):
                    self._run(
                        "INSERT INTO activations SELECT feature_id, sequence_id, token_idx, "
                        "strength FROM _source.main.activations WHERE "
                        f"feature_id >= {start} AND feature_id < {end} ORDER BY {_ORDER}",
                        advance,
                        done,
                        done + rows,
                    )
            done += rows

    def _copy_labels(self) -> int:
        if "autointerp" in self._tables:
            columns = ", ".join(
                column if column in self._tables["autointerp"] else f"NULL AS {column}"
                for column in ("feature_id", "label", "quality", "interestingness", "model_name",
                               "prompt_version")
            )  # fmt: skip
            create = f"CREATE OR REPLACE TABLE autointerp ({TABLES['autointerp']})"
            execute(self._connection, create)
            execute(
                self._connection,
                f"INSERT INTO autointerp SELECT {columns} FROM _source.main.autointerp",
            )
        elif self._labels is not None:
            with registered(self._connection, self._labels) as name:
                execute(
                    self._connection,
                    f"CREATE OR REPLACE TABLE autointerp AS SELECT * FROM {name} "
                    "ORDER BY feature_id",
                )
        else:
            return 0
        return self._rows("autointerp")

    def _write_meta(self, d_sae: int, tokens: int) -> None:
        values = {
            "format": FORMAT,
            "version": VERSION,
            "d_sae": str(d_sae),
            "rows": str(tokens),
            "imported_from": json.dumps(self._source.path.name),
            "r1sae_fast_version": version("r1sae-fast"),
            "duckdb_version": duckdb.__version__,
        }
        if self._counted is not None:
            values |= {
                "histogram_edges": json.dumps(histogram_edges().tolist()),
                "position_edges": json.dumps(POSITION_EDGES),
            }
        if "meta" in self._tables:  # one of ours: what it says of itself stays true
            values |= dict(execute(self._connection, "SELECT key, value FROM _source.main.meta"))
        execute(self._connection, f"CREATE OR REPLACE TABLE meta ({TABLES['meta']})")
        for key, value in values.items():
            execute(self._connection, "INSERT INTO meta VALUES (?, ?)", [key, value])

    def _rows(self, table: str) -> int:
        return int(execute(self._connection, f"SELECT count(*) FROM {table}")[0][0])

    def _run(self, query: str, advance: Advance, start: float, end: float) -> None:
        """Runs a long query, which brings what is done from ``start`` to ``end``."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.25):
                with suppress(duckdb.Error):
                    share = min(max(self._connection.query_progress(), 0.0), 100.0) / 100
                    advance(start + (end - start) * share)

        watcher = threading.Thread(target=watch, daemon=True)
        if hasattr(self._connection, "query_progress"):  # not in old versions of DuckDB
            watcher.start()
        try:
            execute(self._connection, query)
        finally:
            done.set()
            if watcher.ident is not None:
                watcher.join()
        advance(end)


def _require_destination(source: Source, destination: Path, overwrite: bool) -> None:
    if destination.exists() and not overwrite:
        raise FileExistsError(
            f"{destination}: exists already; pass overwrite=True (--overwrite) to replace it"
        )
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"{destination.parent}: no such folder; make it first")
    files = [source.path]
    if isinstance(source, SqliteSource):
        files = [source.tokens.path, source.activations.path]
    if destination.exists() and any(destination.samefile(file) for file in files):
        raise ValueError(f"{destination}: is the source itself; choose another destination")
