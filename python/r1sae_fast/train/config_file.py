"""A training run described by a TOML file: what ``r1sae train run.toml`` reads."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from r1sae_fast.train.config import TrainConfig
from r1sae_fast.train.parallel.layout import Layout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["TrainFile", "read_train_file"]


@dataclass(frozen=True)
class TrainFile:
    """What the file says; None where it says nothing."""

    config: TrainConfig
    shards: Path
    out: Path
    device: str | None
    checkpoint_seconds: float | None
    evaluate_rows: int | None
    layout: Layout | None


_RUN: dict[str, tuple[type | tuple[type, ...], str]] = {
    "shards": (str, "a folder's name"),
    "out": (str, "a folder's name"),
    "device": (str, 'a device, such as "cuda"'),
    "checkpoint_seconds": ((int, float), "a number"),
    "evaluate_rows": (int, "an int"),
    "parallel": (dict, "a table, [parallel]"),
}


def read_train_file(path: Path, overrides: dict[str, Any] | None = None) -> TrainFile:
    """Reads a run's file.

    Its keys are the fields of :class:`TrainConfig`, and ``shards``, ``out`` (folders, relative to
    the file's own), ``device``, ``checkpoint_seconds`` and ``evaluate_rows``; and a table
    ``[parallel]`` with the fields of :class:`~r1sae_fast.train.parallel.Layout`.

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
    required = [name for name, field in settings.items() if field.default is MISSING]
    missing = [name for name in ("shards", "out", *required) if name not in values]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    for key, (kind, said) in _RUN.items():
        value = values.get(key)
        if key in values and (isinstance(value, bool) or not isinstance(value, kind)):
            raise TypeError(f"{path}: {key} is {value!r}; expected {said}")
    try:
        config = TrainConfig(**{name: values[name] for name in settings if name in values})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None
    beside = Path() if overrides and "out" in overrides else path.parent
    return TrainFile(
        config,
        shards=path.parent / values["shards"],
        out=beside / values["out"],
        device=values.get("device"),
        checkpoint_seconds=values.get("checkpoint_seconds"),
        evaluate_rows=values.get("evaluate_rows"),
        layout=_layout(path, values["parallel"]) if "parallel" in values else None,
    )


def _layout(path: Path, table: dict[str, Any]) -> Layout:
    known = [field.name for field in fields(Layout)]
    for key in table:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r} in [parallel]{_nearest(key, known)}")
    try:
        return Layout(**table)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def _nearest(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected some of {', '.join(known)}"
