"""Evaluations on disk: one JSON file, written whole or not at all.

``{"format": "r1sae-eval", "version": 1, "r1sae_fast": ..., "settings": {...}, "saes": [...]}``.
An entry of ``saes`` says which SAE it is (name, fingerprint, sizes, k) and has ``decoder``,
``reconstruction``, ``in_model`` and ``answers``, each null where it was not measured; their fields
are those of the dataclasses. What is not defined (NaN) or infinite is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1sae_fast.atomic import write_bytes
from r1sae_fast.encode import fingerprint
from r1sae_fast.errors import CheckpointError
from r1sae_fast.evals.answers import Answers
from r1sae_fast.evals.decoder import DecoderSimilarity
from r1sae_fast.evals.figures import Reconstruction
from r1sae_fast.evals.in_model import InModel
from r1sae_fast.sae import FastSAE

__all__ = ["FORMAT", "VERSION", "entry", "read_report", "write_report"]

FORMAT = "r1sae-eval"
VERSION = 1
PARTS = ("decoder", "reconstruction", "in_model", "answers")


def entry(
    name: str,
    sae: FastSAE,
    *,
    decoder: DecoderSimilarity | None = None,
    reconstruction: Reconstruction | None = None,
    in_model: InModel | None = None,
    answers: Answers | None = None,
) -> dict[str, Any]:
    """What a report says of one SAE, as JSON values."""
    parts = (decoder, reconstruction, in_model, answers)
    return {
        "name": name,
        "fingerprint": fingerprint(sae),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "tied": sae.tied,
        "transcoder": sae.transcoder,
        "dtype": str(sae.dtype).removeprefix("torch."),
        **{
            key: None if part is None else _plain(part.to_json())
            for key, part in zip(PARTS, parts, strict=True)
        },
    }


def write_report(
    path: str | os.PathLike[str], entries: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> None:
    """Writes entries (see :func:`entry`) and what they were measured on.

    Raises:
        OSError: the file can't be written; what was there before still is.
        TypeError: settings that are not JSON.
    """
    from r1sae_fast import __version__

    report = {
        "format": FORMAT,
        "version": VERSION,
        "r1sae_fast": __version__,
        "settings": _plain(dict(settings)),
        "saes": [_plain(dict(one)) for one in entries],
    }
    write_bytes(Path(path), (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_report` wrote.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: no report, one of a later version, or a damaged one.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); expected a report") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise CheckpointError(f'{path}: no report; expected an object with format "{FORMAT}"')
    if report.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: a report of version {report.get('version')!r}; this release reads version "
            f"{VERSION}, so a newer r1sae-fast may be needed"
        )
    saes = report.get("saes")
    if not isinstance(saes, list) or not all(map(_is_entry, saes)):
        raise CheckpointError(f"{path}: the report's saes are damaged; evaluate them again")
    return report


def _is_entry(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("d_sae"), int)
        and all(one.get(part) is None or isinstance(one[part], dict) for part in PARTS)
    )


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
