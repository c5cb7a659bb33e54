"""Weights read ahead: while one part of the model computes, a thread reads the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Job(Generic[Part]):
    """One reading: parts of the same ``kind`` share their room, ``make`` makes room for one,
    ``fill`` reads into it, and ``forget`` drops what its use has added."""

    kind: str
    make: Callable[[], Part]
    fill: Callable[[Part], None]
    forget: Callable[[Part], None]


class Stopped(Exception):
    """Raised in the thread by a reading that was told to stop."""


class ReadAhead(Generic[Part]):
    """Hands out the parts of a list of jobs in their order, each read while the one before it
    is in use, so that at most two of a kind exist. A context manager."""

    def __init__(self, jobs: Sequence[Job[Part]], *, ahead: bool = True) -> None:
        """With ``ahead`` False each part is read when it is asked for."""
        self._jobs = jobs
        self._ahead = ahead
        self.stopping = threading.Event()
        self._free: dict[str, list[Part]] = {}
        self._next = 0
        self._thread: threading.Thread | None = None
        self._read: Part | None = None
        self._error: BaseException | None = None
        self.waited = 0.0  # seconds that a part was not ready when it was asked for

    def __enter__(self) -> ReadAhead[Part]:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._free.clear()
        self._read = None

    @contextmanager
    def part(self) -> Iterator[Part]:
        """The next job's part, for the time of the context; the one after it is being read."""
        part = self._take()
        used = self._jobs[self._next - 1]
        kind = used.kind
        try:
            yield part
        finally:
            used.forget(part)
            # The next part has its room already if it is being read; room that no later one
            # needs is given up for the kinds that follow.
            unread = self._jobs[self._next + (self._thread is not None) :]
            if any(job.kind == kind for job in unread):
                self._free.setdefault(kind, []).append(part)
            else:
                self._free.pop(kind, None)

    def start(self) -> None:
        """Begins to read the next part, unless that has begun."""
        if self._thread is None and self._next < len(self._jobs) and self._ahead:
            self._thread = threading.Thread(target=self._run, name="r1sae-weights", daemon=True)
            self._thread.start()

    def _take(self) -> Part:
        begin = time.monotonic()
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
            self._thread = None
        self.waited += time.monotonic() - begin
        if self._error is not None:
            raise self._error
        part, self._read = self._read, None
        assert part is not None  # _run leaves a part or an error
        self._next += 1
        self.start()
        return part

    def _run(self) -> None:
        job = self._jobs[self._next]
        try:
            free = self._free.get(job.kind)
            part = free.pop() if free else job.make()
            job.fill(part)
            self._read = part
        except BaseException as error:  # noqa: BLE001  # raised where the part is asked for
            self._error = error
