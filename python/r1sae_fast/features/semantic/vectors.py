"""Texts' vectors, kept beside the database: ``<database>.vectors/<model's checksum>.safetensors``.

A vector is found by a hash of its text, in a file of one model. So none can be stale: a label that
changed is another text, a model that changed another file; and what a kill leaves is a beginning.
Several readers may write at once: each its own file, renamed into place; the last one stays.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1sae_fast.atomic import write_bytes
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features.semantic.model import TextModel, Vectors

_FORMAT = "r1sae-vectors"
_VERSION = "1"
_TEXTS = 4096  # embedded at once
_SAVED = 4  # of these between saves: a transformer takes a minute for as many
_KEY = 16  # bytes of a text's hash


def vectors_path(database: Path, model: TextModel) -> Path | None:
    """Where a model's vectors are kept; None for one without a checksum."""
    if model.checksum is None:
        return None
    return database.with_name(database.name + ".vectors") / f"{model.checksum}.safetensors"


def vectors_of(
    texts: Sequence[str],
    model: TextModel,
    path: Path | None,
    progress: Callable[[float], None] = lambda done: None,
) -> Vectors:
    """The vectors ``[texts, dimensions]``, from the file as far as they are there; the rest is made
    and saved, now and then and at the end.

    Raises:
        DatabaseError: the file is damaged, or not ours.
    """
    keys = [hashlib.blake2b(text.encode(), digest_size=_KEY).digest() for text in texts]
    known = {} if path is None else _read(path, model)
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    known = {key: known[key] for key in keys if key in known}  # no texts of the past
    done = len(texts) - len(missing)
    todo = list(missing)
    for number, start in enumerate(range(0, len(todo), _TEXTS), 1):
        part = todo[start : start + _TEXTS]
        known.update(zip(part, model.vectors([missing[key] for key in part]), strict=True))
        done += len(part)
        progress(done)
        if path is not None and (number % _SAVED == 0 or start + _TEXTS >= len(todo)):
            path = _save(path, model, known)
    return np.stack([known[key] for key in keys])


def _save(path: Path, model: TextModel, known: dict[bytes, Vectors]) -> Path | None:
    """Saves; gives None where that can't be done, which only costs time."""
    from safetensors.numpy import save

    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, _KEY)
    vectors = np.stack(list(known.values()))
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": model.name,
        "model_checksum": str(model.checksum),
        "checksum": _checksum(keys, vectors),
    }
    try:
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, save({"keys": keys, "vectors": vectors}, about), by_many=True)
    except OSError as error:
        warnings.warn(
            f"{path}: vectors can't be kept there ({error}); they are made again next time",
            stacklevel=2,
        )
        return None
    return path


def _read(path: Path, model: TextModel) -> dict[bytes, Vectors]:
    """What the file holds; nothing where there is none, or none that may be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb"):
            pass
    except OSError:  # safetensors tells neither permissions nor disks apart
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            keys, vectors = file.get_tensor("keys"), file.get_tensor("vectors")
    except (OSError, SafetensorError) as error:
        raise _refused(path, f"damaged, or no file of vectors ({error})") from None
    if (about.get("format"), about.get("version")) != (_FORMAT, _VERSION):
        raise _refused(path, "no file of vectors of this version")
    if about.get("model_checksum") != model.checksum:
        raise _refused(path, f"holds vectors of another model ({about.get('model')})")
    shaped = (
        keys.dtype == np.uint8
        and vectors.dtype == np.float32
        and vectors.ndim == 2
        and keys.shape == (len(vectors), _KEY)
    )
    if not shaped or _checksum(keys, vectors) != about.get("checksum"):
        raise _refused(path, "damaged")
    return dict(zip(map(bytes, keys), vectors, strict=True))


def _checksum(keys: NDArray[np.uint8], vectors: Vectors) -> str:
    found = hashlib.blake2b(digest_size=16)
    found.update(np.ascontiguousarray(keys).data)
    found.update(np.ascontiguousarray(vectors).data)
    return found.hexdigest()


def _refused(path: Path, why: str) -> DatabaseError:
    return DatabaseError(f"{path}: {why}; remove it, and it is made anew")
