"""Which stages of a demo are finished, in ``demo.json``; the folder is one demo's alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1sae_fast import _core
from r1sae_fast.atomic import write_bytes

FILE = "demo.json"
_FORMAT, _VERSION = "r1sae-demo", 1


class State:
    """The finished stages, each with the seconds it took and what it has to say."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / FILE
        self.settings = settings
        self.finished: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read()
        else:
            self._write()

    def _read(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            known = data["format"] == _FORMAT and data["version"] == _VERSION
            settings, finished = data["settings"], data["finished"]
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(
                f"{self.path}: not a demo's state of this version; "
                "remove the folder, or give another with --out"
            )
        for name in sorted(self.settings.keys() | settings.keys()):
            if self.settings.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path}: this demo was begun with {name} = {settings.get(name)!r}, not "
                    f"{self.settings.get(name)!r}; remove the folder, or give another with --out"
                )
        self.finished = finished

    def _write(self) -> None:
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self.settings,
            "finished": self.finished,
        }
        write_bytes(self.path, (json.dumps(data, indent=2) + "\n").encode())

    def finish(self, stage: str, seconds: float, said: str) -> None:
        """Notes a stage as finished."""
        self.finished[stage] = {"seconds": round(seconds, 2), "said": said}
        self._write()


@contextmanager
def demo_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other demos out of it.

    Raises:
        FileExistsError: the folder holds other things.
        ShardError: another demo is at work in it.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder; give a folder for the demo")
    if folder.exists() and not (folder / FILE).exists():
        ours = {".lock", f"{FILE}.tmp"}
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
        if foreign:
            raise FileExistsError(
                f"{folder}: not empty and not a demo's folder (it holds {foreign[0]!r}); "
                "give an empty or a new folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    lock = _core.FolderLock(folder)
    try:
        yield
    finally:
        lock.release()
