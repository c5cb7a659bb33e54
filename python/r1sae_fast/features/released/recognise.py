"""Saying what a path is: a DuckDB database with its labels, or the first release's SQLite files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.released.files import kind_of
from r1sae_fast.features.released.labels import LABEL_FILES
from r1sae_fast.features.released.layout import describe, expected, find_table
from r1sae_fast.features.released.sqlite import sqlite_tables
from r1sae_fast.features.text import visible

Labels = Path | Literal[False] | None
"""A file of labels; None: the one beside the database, if there is one; False: none."""

_TRIO = ("tokens.db", "feature_activations.db", "autointerp.db")


@dataclass(frozen=True)
class SqliteTable:
    """A table in an SQLite file, and its columns by their names here."""

    path: Path
    table: str
    columns: dict[str, str]


@dataclass(frozen=True)
class DuckdbSource:
    """A DuckDB file that may be a feature database; its tables are looked at when it is opened.

    ``labels`` are those to use where the file has none; ``chosen``: the caller named them.
    """

    path: Path
    labels: Path | None
    chosen: bool


@dataclass(frozen=True)
class SqliteSource:
    """The files of the first release."""

    path: Path
    tokens: SqliteTable
    activations: SqliteTable
    labels: Path | None

    @property
    def size(self) -> int:
        """Bytes of the files that hold tokens and activations."""
        files = {self.tokens.path, self.activations.path}
        return sum(file.stat().st_size for file in files)


Source = DuckdbSource | SqliteSource


def recognise(path: Path, labels: Labels = None) -> Source:
    """What ``path`` is: a file, or a folder with one database in it.

    Raises:
        FileNotFoundError: no such file or folder, or no such file of labels.
        DatabaseError: none of the known kinds; says what is there.
    """
    if isinstance(labels, Path):
        kind_of(labels)  # it must be there
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; build it (`r1sae features build`), or fetch a released one "
            "(`r1sae fetch`)"
        )
    if path.is_dir():
        return _in_folder(path, labels)
    kind = kind_of(path)
    if kind == "duckdb":
        return DuckdbSource(path, _labels(path.parent, labels), isinstance(labels, Path))
    if kind == "sqlite":
        return _sqlite(path, path.parent, labels)
    raise DatabaseError(
        f"{path}: neither a DuckDB nor an SQLite file; expected a feature database (.ddb), or one "
        f"of {', '.join(_TRIO)}"
    )


def _in_folder(folder: Path, labels: Labels) -> Source:
    found = sorted(file for file in folder.iterdir() if file.suffix in (".ddb", ".duckdb"))
    if len(found) == 1:
        return recognise(found[0], labels)
    if found:
        several = ", ".join(visible(file.name) for file in found)
        raise DatabaseError(f"{folder}: holds several databases ({several}); name the one you want")
    for name in _TRIO[:2]:
        if (folder / name).is_file() and kind_of(folder / name) == "sqlite":
            return _sqlite(folder / name, folder, labels)
    names = [visible(file.name) for file in sorted(folder.iterdir())[:10]]
    raise DatabaseError(
        f"{folder}: holds no feature database (it has {', '.join(names) or 'no files'}); expected "
        f"a .ddb file, or {', '.join(_TRIO)}"
    )


def _sqlite(path: Path, folder: Path, labels: Labels) -> SqliteSource:
    """The first release, by any of its files."""
    files = [path, *(folder / name for name in _TRIO if folder / name != path)]
    tables = {
        file: sqlite_tables(file) for file in files if file.is_file() and kind_of(file) == "sqlite"
    }
    found: dict[str, SqliteTable] = {}
    for file, inside in tables.items():
        for table in ("tokens", "activations"):
            match = find_table(table, inside)
            if match is not None:
                found.setdefault(table, SqliteTable(file, *match))
    here = find_table("tokens", tables[path]) or find_table("activations", tables[path])
    if here is None and "autointerp" not in tables[path]:
        raise DatabaseError(
            f"{path}: no feature database that is known here: it has {describe(tables[path])}; "
            f"expected {expected()}"
        )
    missing = [table for table in ("tokens", "activations") if table not in found]
    if missing:
        alone = "labels alone are no database; " if here is None else ""
        raise DatabaseError(
            f"{path}: {alone}the table{'s' * (len(missing) > 1)} {' and '.join(missing)} "
            f"of the first release {'are' if len(missing) > 1 else 'is'} not here; expected "
            f"{_listed(_TRIO)} in one folder ({folder}), with {expected()}; found "
            + "; ".join(f"{file.name}: {describe(inside)}" for file, inside in tables.items())
        )
    beside = _labels(folder, labels)
    if labels is None and "autointerp" in tables[path]:
        beside = path
    return SqliteSource(path, found["tokens"], found["activations"], beside)


def _labels(folder: Path, labels: Labels) -> Path | None:
    if labels is False:
        return None
    if labels is not None:
        return labels
    return next((folder / name for name in LABEL_FILES if (folder / name).is_file()), None)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
