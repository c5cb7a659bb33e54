"""``python -m database build sql sort page query --rows 500000``: the bars of feature databases.

Data of 28,672 features, 64 a token, are made in ``--folder`` (and kept there): as code shards, and
as a database in the released layout. Each part prints a line of JSON; memory is that of a process
of its own. What is read was written just before, so it comes from the system's cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import duckdb

from database import reference
from database.data import activation_batches, write_codes, write_released
from r1sae_fast import _core
from r1sae_fast.features import FeatureDB, clustering
from r1sae_fast.features.attaching import ROW_GROUP, connect_to_write
from r1sae_fast.features.places import places_of
from r1sae_fast.features.schema import TABLES
from r1sae_fast.features.stream import ArrowStream
from r1sae_fast.features.writing import insert_activations
from r1sae_fast.shards import CodeShards

MEMORY = 2 << 30
D_SAE, K = 28_672, 64


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak() -> int:
    """The most memory of this process so far: all, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


class Data:
    """The files of a size."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.rows = rows
        self.folder = folder
        self.codes_path = folder / f"codes-{rows}"
        self.released = folder / f"released-{rows}.ddb"
        self.built = folder / f"built-{rows}.ddb"

    def codes(self) -> CodeShards:
        if not self.codes_path.exists():
            write_codes(self.codes_path, self.rows, D_SAE, K)
        return CodeShards(self.codes_path)


def build(data: Data) -> dict[str, object]:
    """Everything, from code shards to the file."""
    codes, before = data.codes(), peak()
    seconds = timed(
        lambda: FeatureDB.build(
            data.built, codes, decode=lambda token: f" {token}", overwrite=True, progress=False,
            max_memory=MEMORY,
        ).close()
    )  # fmt: skip
    return {"seconds": seconds, "peak_mb": peak(), "peak_before_mb": before}


def statistics(data: Data) -> dict[str, object]:
    """What one pass keeps of each feature, without writing a database."""
    codes, folder = data.codes(), data.folder / "work"
    folder.mkdir(exist_ok=True)
    threads = clustering.default_threads(None)
    took: dict[str, object] = {}

    def features() -> None:
        shards = clustering.shards_of(codes)
        places = places_of(codes, folder / "places")
        counts = clustering.count(shards, codes.d_sae, threads)
        clusters = clustering.Clusters(folder, counts, MEMORY // 4)
        clusters.add_shards(shards, places.ranks, threads, lambda _: None)
        core = places.core()
        for part in clusters.parts():
            for _ in clusters.tables(part, core, clustering.Keep(), threads, _core.Cancel()):
                pass

    def pairs() -> None:
        shards = clustering.shards_of(codes)
        counts = clustering.count(shards, codes.d_sae, threads)
        clustering.partners(shards, counts, 20, MEMORY // 2, threads)

    for name, work in (("features", features), ("pairs", pairs)):
        (folder / "state.json").unlink(missing_ok=True)
        took[name] = timed(work)
    return {**took, "peak_mb": peak()}


def sql(data: Data) -> dict[str, object]:
    """The same tables by DuckDB, of rows that it holds already."""
    path = data.folder / f"sql-{data.rows}.ddb"
    if not path.exists():
        reference.prepare(path, data.codes())
    with duckdb.connect(str(path), config={"memory_limit": f"{MEMORY >> 20}MiB"}) as connection:
        took: dict[str, float] = {}
        for name, query in reference.QUERIES.items():
            took[name] = timed(
                partial(connection.execute, f"CREATE OR REPLACE TEMP TABLE t AS {query}")
            )
            sys.stderr.write(f"{name}: {took[name]:.2f} s\n")
        rows = min(data.rows, reference.PAIR_ROWS)
        query = reference.pairs(rows)
        seconds = timed(partial(connection.execute, f"CREATE OR REPLACE TEMP TABLE t AS {query}"))
        took["pairs"] = seconds * data.rows / rows
    return {**took, "pairs_are_of_rows": rows}


def sort(data: Data) -> dict[str, object]:
    """``activations`` sorted by feature: within it by place by the core, by strength by DuckDB."""
    codes, threads = data.codes(), clustering.default_threads(None)
    folder = data.folder / "sort"
    folder.mkdir(exist_ok=True)
    released = "feature_id INTEGER, sequence_id BIGINT, token_idx INTEGER, strength FLOAT"
    sizes = {}

    def connect(name: str) -> duckdb.DuckDBPyConnection:
        file = folder / f"{name}.ddb"
        file.unlink(missing_ok=True)
        config = {"memory_limit": f"{MEMORY >> 20}MiB", "temp_directory": str(folder / "spill")}
        connection = duckdb.connect(str(file), config=config)
        connection.execute(f"CREATE TABLE activations ({released})")
        return connection

    def core() -> None:
        file = folder / "core.ddb"
        file.unlink(missing_ok=True)
        config = {"memory_limit": f"{MEMORY >> 22}MiB", "default_block_size": "65536"}
        with connect_to_write(file, config, ROW_GROUP) as connection:
            connection.execute(f"CREATE TABLE activations ({TABLES['activations']})")
            shards = clustering.shards_of(codes)
            places = places_of(codes, folder / "places")
            counts = clustering.count(shards, codes.d_sae, threads)
            (folder / "state.json").unlink(missing_ok=True)
            clusters = clustering.Clusters(folder, counts, MEMORY // 4)
            clusters.add_shards(shards, places.ranks, threads, lambda _: None)
            view = places.core()
            keep = clustering.Keep(quantiles=0, negatives=0, tokens=0)
            for part in clusters.parts():
                cancel = _core.Cancel()
                made = clusters.tables(part, view, keep, threads, cancel)
                insert_activations(connection, made, cancel)
            connection.execute("CHECKPOINT")

    def by_duckdb() -> None:
        import pyarrow as pa

        types = {"feature_id": pa.int32(), "sequence_id": pa.int64(), "token_idx": pa.int32(),
                 "strength": pa.float32()}  # fmt: skip
        with connect("duckdb") as connection:
            with ArrowStream(connection, types, activation_batches(codes)) as name:
                connection.execute(
                    f"INSERT INTO activations SELECT * FROM {name} "
                    "ORDER BY feature_id, strength DESC"
                )
            connection.execute("CHECKPOINT")

    def from_table() -> None:
        with connect("table") as connection:
            connection.execute(f"ATTACH '{data.released}' AS released (READ_ONLY)")
            connection.execute(
                "INSERT INTO activations SELECT * FROM released.activations "
                "ORDER BY feature_id, strength DESC"
            )
            connection.execute("CHECKPOINT")

    took: dict[str, object] = {}
    ways = {"core": core, "duckdb": by_duckdb}
    if data.released.exists():
        ways["table"] = from_table
    for name, work in ways.items():
        before = time.process_time()
        took[name] = timed(work)
        took[f"{name}_cpu"] = time.process_time() - before
        sys.stderr.write(f"{name}: {took[name]:.2f} s, {took[f'{name}_cpu']:.2f} of CPU\n")
        file = folder / f"{name}.ddb"
        sizes[name] = file.stat().st_size / int(data.rows * K)
        file.unlink()
    return {**took, "bytes_per_activation": sizes}


_PAGE = """
import json, sys, time
import duckdb, pyarrow, r1sae_fast.features
from r1sae_fast.features import FeatureDB
path, feature = sys.argv[1], int(sys.argv[2])
def page(db, feature):
    db.feature(feature), db.top(feature, 10, 10)
    for table in ("examples", "intervals", "negatives", "coactivations", "neighbours",
                  "token_lift"):
        db.sql(f"SELECT * FROM {table} WHERE feature_id = {feature}")
start = time.perf_counter()
db = FeatureDB(path)
page(db, feature)
cold = time.perf_counter() - start
warm = []
for other in range(5, 28000, 1400):
    start = time.perf_counter()
    page(db, other)
    warm.append(time.perf_counter() - start)
warm.sort()
print(json.dumps([cold, warm[len(warm) // 2], warm[-1]]))
"""


def page(data: Data) -> dict[str, object]:
    """A feature's page in a new process, and then of twenty others."""
    command = [sys.executable, "-c", _PAGE, str(data.built), "1234"]
    found = [json.loads(subprocess.check_output(command)) for _ in range(3)]
    cold, warm, worst = (sorted(column)[1] for column in zip(*found, strict=True))
    return {"cold_ms": cold * 1e3, "warm_median_ms": warm * 1e3, "warm_worst_ms": worst * 1e3}


NOTEBOOK = """
    WITH top_k_tokens AS (
        SELECT sequence_id, token_idx, strength FROM activations WHERE feature_id = {feature}
        ORDER BY strength DESC LIMIT 10)
    SELECT t.sequence_id, t.token_idx, t.decoded_token, k.strength
    FROM tokens t JOIN top_k_tokens k ON t.sequence_id = k.sequence_id
    AND t.token_idx BETWEEN k.token_idx - 5 AND k.token_idx + 5
    ORDER BY k.strength DESC, t.sequence_id, t.token_idx"""


def query(data: Data) -> dict[str, object]:
    """The notebook's query on both files."""
    if not data.released.exists():
        write_released(data.released, data.codes())
    rows, took = [], []
    for path in (data.built, data.released):
        with duckdb.connect(str(path), read_only=True) as connection:
            connection.execute(NOTEBOOK.format(feature=7)).fetchall()
            times, found = [], []
            for feature in (100, 3000, 9000, 20000, 28000):
                start = time.perf_counter()
                found.append(connection.execute(NOTEBOOK.format(feature=feature)).fetchall())
                times.append(time.perf_counter() - start)
            rows.append(found)
            took.append(sorted(times)[2])
    return {
        "same_rows": rows[0] == rows[1],
        "ours_ms": took[0] * 1e3,
        "released_ms": took[1] * 1e3,
        "times": took[1] / took[0],
        "released_bytes_per_activation": data.released.stat().st_size / int(data.rows * K),
        "ours_bytes_per_activation": data.built.stat().st_size / int(data.rows * K),
    }


PARTS: dict[str, Callable[[Data], dict[str, object]]] = {
    "build": build,
    "statistics": statistics,
    "sql": sql,
    "sort": sort,
    "page": page,
    "query": query,
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="database", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--folder", type=Path, required=True)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    data = Data(chosen.folder, chosen.rows)
    for part in chosen.parts:
        found = PARTS[part](data)
        line = json.dumps({"part": part, "rows": chosen.rows, **found})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
