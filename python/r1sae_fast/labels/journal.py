"""What was answered and what is finished: a file beside the database, until both are merged.

The database can then be read by anyone while features are labelled (DuckDB lets a writer in only
where nobody reads), and a crash costs the requests in flight, no more. ``<db>.labels.jsonl``: a
header that tells which database it is of, then a line for each reply, when it comes, and one for
each finished feature, which is on the disk before the next is begun to be counted as done. A last
line that a crash cut in half does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from r1sae_fast.atomic import write_bytes
from r1sae_fast.errors import LabelError
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.summary import Score
from r1sae_fast.labels.cost import Usage
from r1sae_fast.labels.exchange import Reply

_FORMAT = {"format": "r1sae-labels", "version": 1}
Try = tuple[str, int]
"""A request's key, and how often it was asked before."""


@dataclass(frozen=True)
class Finished:
    """A labelled feature."""

    feature: int
    label: str
    model_name: str
    prompt_version: str
    scores: tuple[Score, ...]
    usage: Usage

    @property
    def key(self) -> tuple[int, str, str]:
        """What there is one label of."""
        return self.feature, self.model_name, self.prompt_version


@dataclass(frozen=True)
class Answered:
    """A reply that was paid for."""

    feature: int
    key: str
    attempt: int
    reply: Reply
    usage: Usage


def journal_path(database: Path) -> Path:
    """Where a database's journal lies."""
    return database.with_name(database.name + ".labels.jsonl")


def fingerprint(db: FeatureDB) -> str:
    """Tells one database from another, or from itself before it was built anew."""
    sizes = db.sql("SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM activations)")
    parts = [sorted(db.metadata.items()), [column.to_pylist() for column in sizes.columns]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Journal:
    """The open journal. One at a time (the caller holds a lock).

    Args:
        path: its file; made where it is not there.
        database: the :func:`fingerprint` of what it is of.
        read_only: changes nothing, and needs no lock: another process may be writing it.

    Raises:
        LabelError: a journal of another database, or no journal.
    """

    def __init__(self, path: Path, database: str, *, read_only: bool = False) -> None:
        self.path = path
        self._read_only = read_only
        self._header = {**_FORMAT, "database": database}
        self.finished: dict[tuple[int, str, str], Finished] = {}
        self._replies: dict[Try, Answered] = {}
        self._lost: dict[int, float] = {}  # by unfinished feature
        if path.exists():
            self._read()
        elif not read_only:
            write_bytes(path, _line(self._header))
        self._descriptor = -1 if read_only else os.open(path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._read_only:
            os.fsync(self._descriptor)
            os.close(self._descriptor)

    @property
    def replies(self) -> int:
        """How many answers there are of unfinished features."""
        return len(self._replies)

    @property
    def spent(self) -> float:
        """What all in it cost."""
        used = [entry.usage for entry in self.finished.values()]
        used += [entry.usage for entry in self._replies.values()]
        return sum(usage.cost for usage in used) + sum(self._lost.values())

    @property
    def unfinished(self) -> set[int]:
        """Features that were asked about, but have no label yet."""
        return {entry.feature for entry in self._replies.values()}

    def reply(self, key: str, attempt: int) -> Answered | None:
        """What was answered to a request before."""
        return self._replies.get((key, attempt))

    def add_reply(self, answered: Answered) -> None:
        """Notes an answer; the system has it when this returns."""
        self._replies[answered.key, answered.attempt] = answered
        self._write({"reply": asdict(answered)})

    def lost(self, feature: int) -> float:
        """What tries without an answer may have cost, of a feature that is not finished."""
        return self._lost.get(feature, 0.0)

    def add_lost(self, feature: int, cost: float) -> None:
        """Notes such a try."""
        self._lost[feature] = self.lost(feature) + cost
        self._write({"lost": {"feature": feature, "cost": cost}})

    def finish(self, finished: Finished) -> None:
        """Notes a feature; it is on the disk when this returns. Its replies are needed no more."""
        self._write({"label": asdict(finished)})
        os.fsync(self._descriptor)
        self._finish(finished)

    def rewrite(self, merged: Iterable[tuple[int, str, str]]) -> None:
        """Forgets features that the database holds now; the file is replaced, or removed if empty.

        To be called on a closed journal.
        """
        for key in merged:
            self.finished.pop(key, None)
        rest: Sequence[dict[str, Any]] = [
            *({"label": asdict(entry)} for entry in self.finished.values()),
            *({"reply": asdict(entry)} for entry in self._replies.values()),
            *({"lost": {"feature": f, "cost": cost}} for f, cost in self._lost.items()),
        ]
        if rest:
            write_bytes(self.path, _line(self._header) + b"".join(map(_line, rest)))
        else:
            self.path.unlink(missing_ok=True)

    def _finish(self, finished: Finished) -> None:
        self.finished[finished.key] = finished
        done = finished.feature
        self._lost.pop(done, None)
        self._replies = {k: v for k, v in self._replies.items() if v.feature != done}

    def _write(self, entry: dict[str, Any]) -> None:
        data = _line(entry)
        before = os.fstat(self._descriptor).st_size
        try:
            while data:  # one call but for a full disk, which raises
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            # Half a line would make one of the next, which is of another request.
            os.truncate(self.path, before)
            raise

    def _read(self) -> None:
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        whole = content.rfind(b"\n") + 1
        self._check(lines[0])
        number = 1
        try:
            for number, line in enumerate(lines[1:-1], 2):  # noqa: B007  # told below
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LabelError(
                f"{self.path}: line {number} is damaged ({error}); restore the file, or move it "
                "away: the answers in it will be asked for anew"
            ) from None
        if whole < len(content) and not self._read_only:
            os.truncate(self.path, whole)

    def _check(self, line: bytes) -> None:
        try:
            header = json.loads(line)
            fits = {key: header[key] for key in _FORMAT} == _FORMAT
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise LabelError(f"{self.path}: no journal of labels; move it away")
        if header.get("database") != self._header["database"]:
            raise LabelError(
                f"{self.path}: holds unmerged labels of another database, or of this one before it "
                "was built anew; move the file away if they are no longer wanted"
            )

    def _take(self, entry: dict[str, Any]) -> None:
        if "reply" in entry:
            e = entry["reply"]
            answered = Answered(
                e["feature"], e["key"], e["attempt"], Reply(**e["reply"]), Usage(**e["usage"])
            )
            self._replies[answered.key, answered.attempt] = answered
        elif "lost" in entry:
            e = entry["lost"]
            self._lost[e["feature"]] = self.lost(e["feature"]) + e["cost"]
        else:
            e = entry["label"]
            scores = tuple(Score(**score) for score in e.pop("scores"))
            self._finish(Finished(**{**e, "scores": scores, "usage": Usage(**e["usage"])}))


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
