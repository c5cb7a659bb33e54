"""Labelling many features: in rounds, each merged into the database when it is done."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from r1sae_fast.errors import DatabaseError, LabelError
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.lock import require_not_open
from r1sae_fast.labels.ask import Asker, UnusableError
from r1sae_fast.labels.client import Client, EndpointError, RequestError
from r1sae_fast.labels.cost import Budget, BudgetReachedError, Prices, Usage
from r1sae_fast.labels.endpoint import Endpoint
from r1sae_fast.labels.journal import Journal, fingerprint, journal_path
from r1sae_fast.labels.merge import labelling_lock, merge
from r1sae_fast.labels.select import labelled, select, spent_before
from r1sae_fast.labels.settings import LabelSettings
from r1sae_fast.labels.windows import Sampler, TooFewError

T = TypeVar("T")

ROUND = 256  # features: some ten thousand requests, of which a round's end idles for a few
_FAILURES = 5  # features in a row at which the server failed: it is down


@dataclass
class LabelRun:
    """What a run did, and while it runs, what it has done so far.

    ``skipped`` and ``failed`` tell why by feature. Failed ones are tried again by the next run;
    those whose answers could not be used, only with ``retry_failed``.
    ``stopped`` says why the run ended before its last feature, if it did; ``unmerged`` why the
    labels are still in the journal, if they are.
    """

    total: int = 0
    labelled_features: list[int] = field(default_factory=list)
    before: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    asked: Usage = field(default_factory=Usage)
    replayed: int = 0
    lost: int = 0
    spent: float = 0.0
    stopped: str | None = None
    unmerged: str | None = None
    waiting: str = ""
    model_name: str = ""
    prompt_version: str = ""

    @property
    def labelled(self) -> int:
        """Features that got a label."""
        return len(self.labelled_features)

    @property
    def done(self) -> int:
        """Features that are dealt with."""
        return self.labelled + len(self.skipped) + len(self.failed)


def label_features(
    path: str | Path,
    endpoint: Endpoint,
    settings: LabelSettings | None = None,
    features: Sequence[int] | None = None,
    *,
    prices: Prices | None = None,
    max_cost: float | None = None,
    jobs: int = 16,
    timeout: float = 300.0,
    retries: int = 8,
    round_size: int = ROUND,
    retry_failed: bool = False,
    watch: Callable[[LabelRun], None] = lambda run: None,
) -> LabelRun:
    """Has a language model label features of a database, and scores the labels.

    Features that this model labelled before, with the same prompts and settings, are left out: the
    same call goes on where another one stopped, however it did, and pays for nothing twice but
    the requests that were in flight. Others may read the database meanwhile; labels are merged
    into it after each ``round_size`` features and at the end.

    Args:
        path: a database that this package built or imported, with the text of its tokens. It must
            not be open in this process.
        endpoint: the language model.
        settings: sizes and seeds; default: delphi's.
        features: which; default: all that are alive.
        prices: of tokens, to count money.
        max_cost: stops before this labeller has cost more, earlier runs on this database counted.
        jobs: requests at once.
        timeout: seconds for one answer.
        retries: of a request that fails.
        round_size: features between merges.
        retry_failed: asks again about features whose answers could not be used: each request three
            times more. Else these answers, which were paid for, are read again and fail again.
        watch: called whenever something is done.

    Returns:
        what was done. A cap that is reached is no error: see :attr:`LabelRun.stopped`.

    Raises:
        LabelError: the server refuses all requests (:class:`EndpointError`), or is down. What was
            finished before is merged.
        DatabaseError: no database to label, or one that this process has open.
        ValueError: a cap without prices, or no such feature.
        MissingExtraError: httpx2 is not installed.
    """
    # Resolved: the journal and the lock of a database are the same by whatever name it is called.
    path, settings = Path(path).resolve(), settings or LabelSettings()
    if max_cost is not None and (prices is None or not max_cost > 0):
        raise ValueError(
            "max_cost needs the prices of tokens" if prices is None else "max_cost must be above 0"
        )
    require_not_open(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise DatabaseError(f"{path}: can't be written to; labels would have no place")
    run = LabelRun(model_name=endpoint.model, prompt_version=settings.prompt_version)
    with labelling_lock(path):
        with FeatureDB(path) as db:
            mark = fingerprint(db)
            wanted = select(db, features)
            before = labelled(db, run.model_name, run.prompt_version)
            run.spent = spent_before(db, run.model_name, run.prompt_version)
        with Journal(journal_path(path), mark) as journal:
            before |= {f for f, *who in journal.finished if who == [*_who(run)]}
            run.spent += journal.spent
        todo = [feature for feature in wanted if feature not in before]
        run.total, run.before = len(todo), len(wanted) - len(todo)

        async def go() -> None:
            budget = Budget(prices, max_cost, run.spent)
            async with Client(
                endpoint, budget, jobs=jobs, timeout=timeout, retries=retries
            ) as client:
                for start in range(0, len(todo), round_size):
                    part = todo[start : start + round_size]
                    with _round(path, mark, run) as (db, journal):
                        asker = Asker(
                            client, journal, endpoint, settings, prices, run.asked, retry_failed
                        )
                        await _Round(db, asker, run, budget, watch).work(part, jobs)
                    if run.stopped:
                        break

        if journal.finished and not todo:
            _merge(path, journal, run)
        _run(go())
    return run


def _who(run: LabelRun) -> tuple[str, str]:
    return run.model_name, run.prompt_version


@contextmanager
def _round(path: Path, mark: str, run: LabelRun) -> Iterator[tuple[FeatureDB, Journal]]:
    """Database and journal for a round, which is merged however it ends."""
    journal = Journal(journal_path(path), mark)
    try:
        with journal, FeatureDB(path) as db:
            yield db, journal
    finally:
        _merge(path, journal, run)


def _merge(path: Path, journal: Journal, run: LabelRun) -> None:
    try:
        merge(path, journal)
        run.unmerged = None
    except (DatabaseError, OSError) as error:
        run.unmerged = str(error)


class _Round:
    """Some features at once: enough to keep all requests busy, few enough to finish soon."""

    def __init__(
        self,
        db: FeatureDB,
        asker: Asker,
        run: LabelRun,
        budget: Budget,
        watch: Callable[[LabelRun], None],
    ) -> None:
        self._sampler = Sampler(db, asker.settings)
        self._asker = asker
        self._run = run
        self._budget = budget
        self._watch = watch
        self._threads = ThreadPoolExecutor(2, "sampling")
        self._failures = 0
        self._fatal: LabelError | None = None

    async def work(self, features: Sequence[int], jobs: int) -> None:
        """Labels them.

        Raises:
            LabelError: nothing more can be labelled.
        """
        left = iter(features)
        workers = [asyncio.create_task(self._worker(left)) for _ in range(2 + jobs // 4)]
        ticking = asyncio.create_task(self._tick())
        all_done = asyncio.gather(*workers)
        try:
            either: list[asyncio.Future[Any]] = [all_done, ticking]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if ticking.done():
                await ticking  # raises what ``watch`` did
            await all_done
        finally:
            for task in (*workers, ticking):
                task.cancel()
            await asyncio.gather(*workers, ticking, all_done, return_exceptions=True)
            # Their queries too have ended before the database is closed and written to.
            self._threads.shutdown(cancel_futures=True)
            self._tell()
        if self._fatal is not None:
            raise self._fatal

    async def _tick(self) -> None:
        while True:
            self._tell()
            await asyncio.sleep(0.25)

    async def _worker(self, left: Iterator[int]) -> None:
        loop = asyncio.get_running_loop()
        for feature in left:
            if self._run.stopped or self._fatal:
                return
            try:
                sample = await loop.run_in_executor(self._threads, self._sampler.sample, feature)
                self._asker.journal.finish(await self._asker.label(sample))
                self._run.labelled_features.append(feature)
                self._failures = 0
            except TooFewError as error:
                self._run.skipped[feature] = str(error)
            except UnusableError as error:
                self._run.failed[feature] = str(error)
            except RequestError as error:
                self._run.failed[feature] = str(error)
                self._failures += 1
                if self._failures >= _FAILURES:
                    self._fatal = LabelError(
                        f"{_FAILURES} features in a row failed; the last: {error}. What is "
                        "finished is kept; the same command goes on"
                    )
            except EndpointError as error:
                self._fatal = error
            except BudgetReachedError:
                self._run.stopped = "the next request could pass the cap"
            self._tell()

    def _tell(self) -> None:
        run, client = self._run, self._asker.client
        run.replayed, run.lost = self._asker.replayed, client.lost_tries
        run.waiting, run.spent = client.waiting, self._budget.spent
        self._watch(run)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Runs to the end; in a notebook, whose own loop is running, on another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    errors: list[BaseException] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="labelling")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    for error in errors:
        raise error
