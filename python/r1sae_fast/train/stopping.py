"""SIGTERM, as batch schedulers send it before they kill: a run saves, then ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGTERM
"""Exit status of a run that was told to stop, as shells have it."""


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM has come; within, it ends nothing by itself.

    Python lets the main thread alone handle signals: in another, the function is always False and
    SIGTERM does what it did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    told = threading.Event()

    def tell(number: int, frame: FrameType | None) -> None:
        told.set()

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield told.is_set
    finally:
        # None: it was not set by Python, which then can't set it again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
