"""Downloading one object: parallel ranges, each of which goes on from where it was cut."""

from __future__ import annotations

import asyncio
import random
import threading
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

from r1sae_fast.errors import FetchError
from r1sae_fast.fetch.journal import Journal
from r1sae_fast.fetch.store import Bucket, Remote, explain

TRIES = 8
"""Failures in a row, without a byte between them, after which a range gives up."""

_CHUNK = 1 << 18
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 15.0


async def head(bucket: Bucket, key: str) -> Remote:
    """The object's size and ETag.

    Raises:
        FetchError: it is not there, not public, or the server can't be reached.
    """
    import obstore
    from obstore import exceptions

    failures = 0
    while True:
        try:
            meta = await obstore.head_async(bucket.store, key)
        except (exceptions.BaseError, FileNotFoundError) as error:  # 404 is the latter
            known = explain(bucket, key, error)
            if known is not None:
                raise known from None
            failures += 1
            if failures == TRIES:
                raise _gave_up(bucket, key, error) from None
            await _wait(failures)
            continue
        if not meta["e_tag"]:
            raise FetchError(f"{bucket}/{key}: the server gives no ETag; use another endpoint")
        return Remote(f"{bucket}/{key}", meta["size"], meta["e_tag"])


async def download(
    bucket: Bucket, key: str, remote: Remote, journal: Journal, jobs: int,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Fetches the pieces that the journal lacks, ``jobs`` at a time.

    ``advance`` is told of bytes as they come. Whatever ends it, the journal knows what came.

    Raises:
        FetchError: the object changed or is gone, or the server failed too often.
        OSError: what the disk has against it.
    """
    todo = iter([index for index in range(journal.pieces) if index not in journal.done])

    async def work() -> None:
        for index in todo:
            await _piece(bucket, key, remote, journal, index, advance)

    tasks = [asyncio.ensure_future(work()) for _ in range(jobs)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        journal.sync()


async def _piece(
    bucket: Bucket, key: str, remote: Remote, journal: Journal, index: int,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    import obstore
    from obstore import exceptions

    at, end = journal.bounds(index)
    checksum = failures = 0
    while at < end:
        reason: Exception | str = "the answer ended too early"
        try:
            result = await obstore.get_async(
                bucket.store, key, options={"range": (at, end), "if_match": remote.etag}
            )
            # Not every server minds If-Match.
            if (result.meta["e_tag"], result.meta["size"]) != (remote.etag, remote.size):
                raise exceptions.PreconditionError("another ETag or size")
            # A connection that ends drops what was gathered of a chunk: a bad one gathers nothing.
            chunks = aiter(result.stream(min_chunk_size=1 if failures else _CHUNK))
            while True:
                try:
                    data = memoryview(await anext(chunks))
                except StopAsyncIteration:
                    break
                data = data[: end - at]
                if not len(data):
                    break
                journal.write(at, data)
                checksum = zlib.crc32(data, checksum)
                at += len(data)
                failures = 0
                advance(len(data))
        except (exceptions.BaseError, FileNotFoundError) as error:  # 404 is the latter
            known = explain(bucket, key, error)
            if known is not None:
                raise known from None
            reason = error
        if at < end:
            failures += 1
            if failures >= TRIES:
                raise _gave_up(bucket, key, reason) from None
            await _wait(failures)
    journal.finish(index, checksum)


async def _wait(failures: int) -> None:
    longest = min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT)
    await asyncio.sleep(longest * random.uniform(0.5, 1))


def _gave_up(bucket: Bucket, key: str, error: Exception | str) -> FetchError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return FetchError(
        f"{bucket}/{key}: failed {TRIES} times in a row ({first}); what came so far is kept: run "
        "the same again when the connection is better"
    )


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs it on a thread with a loop of its own, so that notebooks' loops don't matter.

    Ctrl-c cancels it, and is raised once it has ended.
    """
    state: dict[str, Any] = {}
    begun = threading.Event()

    async def main() -> None:
        state["loop"], state["task"] = asyncio.get_running_loop(), asyncio.current_task()
        begun.set()
        await coroutine

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001  # raised again by the caller's thread
            state["error"] = error
        finally:
            begun.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        begun.wait()
        if thread.is_alive():
            state["loop"].call_soon_threadsafe(state["task"].cancel)
        thread.join()
        raise
    if "error" in state:
        raise state["error"]
