"""A training run described by a TOML file: what ``r1sae train run.toml`` reads."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.engine_settings import EngineSettings
from r1sae_fast.train.parallel.layout import Layout
from r1sae_fast.train.sweep import sweep_configs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["TrainFile", "read_train_file"]

Table = TypeVar("Table", Layout, EngineSettings)


@dataclass(frozen=True)
class TrainFile:
    """What the file says; None where it says nothing."""

    config: TrainConfig
    """The first one, where there is a sweep."""
    shards: Path | None
    """None where an engine makes the rows."""
    targets: Path | None
    """Of a transcoder: activations that it makes of those."""
    out: Path
    device: str | None
    checkpoint_seconds: float | None
    evaluate_rows: int | None
    layout: Layout | None
    data: EngineSettings | None
    sweep: dict[str, TrainConfig] | None
    """By name."""
    log: tuple[str, ...]
    """To which loggers its metrics go besides."""
    folder: Path
    """The file's own."""


_RUN: dict[str, tuple[type | tuple[type, ...], str]] = {
    "shards": (str, "a folder's name"),
    "out": (str, "a folder's name"),
    "targets": (str, "a folder's name"),
    "device": (str, 'a device, such as "cuda"'),
    "checkpoint_seconds": ((int, float), "a number"),
    "evaluate_rows": (int, "an int"),
    "parallel": (dict, "a table, [parallel]"),
    "data": (dict, "a table, [data]"),
    "sweep": (dict, "a table, [sweep]"),
    "log": (list, "a list of loggers"),
}


_KINDS = {
    "tied": "has both tied and targets; a transcoder's encoder and decoder can't be one matrix",
    "skip_connection": "has skip_connection without targets; it is for transcoders alone",
}


def read_train_file(path: Path, overrides: dict[str, Any] | None = None) -> TrainFile:
    """Reads a run's file.

    Its keys are the fields of :class:`TrainConfig`, and ``shards``, ``targets`` (of a transcoder),
    ``out`` (folders, relative to the file's own),
    ``device``, ``checkpoint_seconds`` and ``evaluate_rows``; and a table
    ``[parallel]`` with the fields of :class:`~r1sae_fast.train.parallel.Layout`. In place of
    ``shards`` a table ``[data]`` may say which engine makes the rows
    (:class:`~r1sae_fast.train.engine_settings.EngineSettings`). A table ``[sweep]`` has lists of
    values of further fields: an SAE for each combination. ``log`` lists loggers.

    Args:
        path: the file.
        overrides: keys that take the place of the file's, as from a command line; an ``out`` among
            them is relative to the working folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no TOML, an unknown key (the nearest known one is named), one that is missing,
            or settings that :class:`TrainConfig` refuses.
        TypeError: a value of another type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    settings = {field.name: field for field in fields(TrainConfig)}
    for key in found:
        if key not in settings and key not in _RUN:
            raise ValueError(f"{path}: unknown key {key!r}{_nearest(key, [*_RUN, *settings])}")
    values: dict[str, Any] = found | (overrides or {})
    for key, (kind, said) in _RUN.items():
        value = values.get(key)
        if key in values and (isinstance(value, bool) or not isinstance(value, kind)):
            raise TypeError(f"{path}: {key} is {value!r}; expected {said}")
    if "shards" in values and "data" in values:
        raise ValueError(f"{path}: has both shards and [data]; expected one of them")
    if "targets" in values and "data" in values:
        raise ValueError(
            f"{path}: has both targets and [data]; a transcoder is trained from shards of both "
            "points: give shards in place of [data]"
        )
    for key in ("tied", "skip_connection"):
        # Said here, before a model or shards are opened.
        if values.get(key) is True and ("targets" in values) != (key == "skip_connection"):
            raise ValueError(f"{path}: {_KINDS[key]}")
    grid = values.get("sweep", {})
    # All combinations have values of these: which one checks the rest doesn't matter.
    values |= {name: of[0] for name, of in grid.items() if isinstance(of, list) and of}
    required = [name for name, field in settings.items() if field.default is MISSING]
    rows = () if "data" in values else ("shards",)
    missing = [name for name in (*rows, "out", *required) if name not in values]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    try:
        config = TrainConfig(**{name: values[name] for name in settings if name in values})
        sweep = sweep_configs(config, grid) if "sweep" in values else None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None
    beside = Path() if overrides and "out" in overrides else path.parent
    return TrainFile(
        config,
        shards=None if "data" in values else path.parent / values["shards"],
        targets=path.parent / values["targets"] if "targets" in values else None,
        out=beside / values["out"],
        device=values.get("device"),
        checkpoint_seconds=values.get("checkpoint_seconds"),
        evaluate_rows=values.get("evaluate_rows"),
        layout=_table(path, "parallel", Layout, values),
        data=_table(path, "data", EngineSettings, values),
        sweep=sweep,
        log=tuple(map(str, values.get("log", ()))),
        folder=path.parent,
    )


def _table(path: Path, name: str, kind: type[Table], values: dict[str, Any]) -> Table | None:
    """The table of that name as the dataclass whose fields are its keys."""
    if name not in values:
        return None
    table, known = values[name], {field.name: field for field in fields(kind)}
    for key in table:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r} in [{name}]{_nearest(key, list(known))}")
    for key, field in known.items():
        if field.default is MISSING and key not in table:
            raise ValueError(f"{path}: [{name}] lacks {key}")
    try:
        return kind(**table)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: [{name}]: {error}") from None


def _nearest(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected some of {', '.join(known)}"
