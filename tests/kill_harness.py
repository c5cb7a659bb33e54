"""Builds or imports in children that kill themselves before or after the n-th piece of work.

    kill_harness.py build | import | import-by-DuckDB SOURCE DESTINATION TURN...

A turn is ``n`` or ``n,text``: die at the n-th piece of work (0: never), with ``text`` before each
token's text. A piece of work is a transaction, or a note of how far a bucket is filled. Each turn
prints whether the child was killed, and which files it left: ``killed old=True tmp=True``.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from r1sae_fast.features import (
    FeatureDB,
    clustering,
    import_database,
    import_sort,
    importing,
    new_file,
)

left = 0


def work() -> None:
    """One piece of work."""
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def count_work() -> None:
    """Has transactions and notes count, before and after."""
    execute, note = new_file.execute, clustering.Clusters.note

    def counted(connection: Any, query: str, parameters: Any = ()) -> Any:
        if query in ("COMMIT", "BEGIN"):
            work()
        rows = execute(connection, query, parameters)
        if query == "COMMIT":
            work()
        return rows

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        work()
        note(self, *arguments, **options)
        work()

    new_file.execute = counted
    clustering.Clusters.note = noted


def build(source: str, destination: str, text: str) -> None:
    """Builds from code shards."""
    clustering._BUCKET_BYTES = 1 << 23
    clustering._GROUP_ROWS = 50

    def decode(token: int) -> str:
        return f"{text}{token}"

    FeatureDB.build(destination, source, decode=decode, overwrite=True, progress=False).close()


def import_(source: str, destination: str, text: str) -> None:
    """Imports a released database, in many ranges."""
    clustering._BUCKET_BYTES = 1 << 19
    import_sort._NOTED_ROWS = 1000
    importing._SORT_BYTES = 1 << 19
    import_database(source, destination, overwrite=True, progress=False)


def import_by_duckdb(source: str, destination: str, text: str) -> None:
    """As where the disk has no room for the core's sort."""
    importing._Import._has_room = lambda *_: False
    import_(source, destination, text)


KINDS: dict[str, Callable[[str, str, str], None]] = {
    "build": build,
    "import": import_,
    "import-by-DuckDB": import_by_duckdb,
}


def main(kind: str, source: str, destination: str, *turns: str) -> None:
    """See above."""
    global left
    count_work()
    for turn in turns:
        number, _, text = turn.partition(",")
        left = int(number)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                KINDS[kind](source, destination, text)
                code = 0
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = {0: "whole", -signal.SIGKILL: "killed"}.get(status, f"failed {status}")
        with open(destination, "rb") as file:
            old = file.read(3) == b"old"
        print(told, f"old={old}", f"tmp={os.path.exists(destination + '.tmp')}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
