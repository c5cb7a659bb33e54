"""A run's folder: one writer at a time, and nothing in it that isn't ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r1sae_fast import _core
from r1sae_fast.train import checkpoint, metrics
from r1sae_fast.train.buffer_file import FILES

DIVERGED = "diverged.txt"
"""In the folder of an SAE that a sweep has given up: why."""

_OURS = {".lock", checkpoint.FILE, metrics.FILE, DIVERGED, "sae.safetensors", "config.json"}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder, made if need be, for one writer at a time.

    Raises:
        FileExistsError, NotADirectoryError: it is something else.
        ShardError: another process trains into it.
    """
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _core.FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder / checkpoint.FILE).exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder; give a folder for the SAE")
    ours = {*_OURS, *(f"{name}.tmp" for name in _OURS)}
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in ours and not path.match(FILES) and not path.match(f"{FILES}.tmp")
    )
    if foreign:
        raise FileExistsError(
            f"{folder}: not empty and not a training run (it holds {foreign[0]!r}); "
            "give an empty or a new folder"
        )
