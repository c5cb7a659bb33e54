"""What waits for the core's work on another thread ends when that work is asked to."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import duckdb
import numpy as np
import pytest

from r1sae_fast import _core
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.clustering import Clusters, Keep, Part, Tables, shards_of
from r1sae_fast.features.execute import interruptible
from r1sae_fast.features.places import places_of
from r1sae_fast.shards import CodeShards

World = Any  # conftest's


class _StopNow(Exception):
    """Raised by a signal's handler, as ctrl-c raises KeyboardInterrupt."""


@pytest.fixture
def stopping() -> Iterator[None]:
    """SIGALRM raises _StopNow."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StopNow

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


def stop_the_main_thread() -> None:
    """Sends it the signal once it waits for another thread's result."""
    main = threading.main_thread().ident
    assert main is not None

    def waits() -> bool:
        # In the `try` of Condition.wait: before it, the standard library holds a lock that a
        # signal's exception would leave locked.
        frame = sys._current_frames()[main]
        back = frame.f_back
        inside = frame.f_code.co_name == "wait" and "gotit" in frame.f_locals
        return inside and back is not None and back.f_code.co_name == "result"

    patience = time.monotonic() + 1200
    while not waits():
        assert time.monotonic() < patience, "the main thread never waits as was expected"
        time.sleep(0.001)
    signal.pthread_kill(main, signal.SIGALRM)


def pool_threads() -> int:
    """DuckDB's own, which Python lists once they have called it, are not among them."""
    return sum(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


@pytest.fixture
def clusters(world: World, tmp_path: Path) -> tuple[Clusters, Part, _core.TokenPlaces]:
    """Activations in several buckets, of which one part is."""
    codes = CodeShards(world.write(tmp_path / "codes"))
    counts = np.count_nonzero(world.dense, axis=0).astype(np.uint64)
    made = Clusters(tmp_path, counts, 64 * int(counts.sum()))
    places = places_of(codes, tmp_path / "places")
    made.add_shards(shards_of(codes), places.ranks, 1, lambda _: None)
    part, *_ = made.parts()
    assert len(part.buckets) > 2
    return made, part, places.core()


def test_work_that_was_cancelled_ends_as_with_ctrl_c(clusters: Any) -> None:
    made, part, places = clusters
    cancel = _core.Cancel()
    assert not cancel.cancelled
    cancel.cancel()
    assert cancel.cancelled
    before = pool_threads()
    tables = made.tables(part, places, Keep(), 1, cancel)
    with pytest.raises(KeyboardInterrupt):
        next(tables)
    assert pool_threads() == before


def test_what_is_closed_in_its_midst_leaves_no_work_behind(clusters: Any) -> None:
    made, part, places = clusters
    before = pool_threads()
    cancel = _core.Cancel()
    tables = made.tables(part, places, Keep(), 1, cancel)
    assert len(next(tables)["activations"]["feature_id"])
    assert not cancel.cancelled
    tables.close()
    assert cancel.cancelled
    assert pool_threads() == before
    # It is of that call alone: the same can be made anew.
    again = list(made.tables(part, places, Keep(), 1, _core.Cancel()))
    assert len(again) == len(part.buckets)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal for one thread")
def test_a_signal_stops_what_a_query_waits_for(stopping: None) -> None:
    cancel = _core.Cancel()

    def work() -> None:
        stop_the_main_thread()
        while not cancel.cancelled:  # nothing that DuckDB could interrupt
            time.sleep(0.001)

    with duckdb.connect() as connection, pytest.raises(_StopNow):
        interruptible(connection, work, cancel.cancel)
    assert cancel.cancelled


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal for one thread")
def test_a_signal_stops_a_build_that_waits_for_a_bucket(
    stopping: None,
    tmp_path: Path,
    make_world: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = make_world(16, sequences=2).write(tmp_path / "codes")
    asked = []

    def endless(
        self: Clusters, part: Part, places: Any, keep: Keep, threads: int, cancel: _core.Cancel
    ) -> Iterator[Tables]:
        stop_the_main_thread()
        while not cancel.cancelled:
            time.sleep(0.001)
        asked.append(part)
        yield from real(self, part, places, keep, threads, cancel)

    real = Clusters.tables
    monkeypatch.setattr(Clusters, "tables", endless)
    before = pool_threads()
    with pytest.raises(_StopNow):
        FeatureDB.build(tmp_path / "f.ddb", codes)
    assert len(asked) == 1
    assert pool_threads() == before
    assert [file.name for file in tmp_path.iterdir()] == ["codes"]
