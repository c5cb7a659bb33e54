"""Feature databases and their labels, whole and verified in a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from r1sae_fast.atomic import sync
from r1sae_fast.errors import FetchError
from r1sae_fast.features.lock import building_lock
from r1sae_fast.fetch.catalogue import keys
from r1sae_fast.fetch.download import download, head, run
from r1sae_fast.fetch.journal import Journal
from r1sae_fast.fetch.store import Bucket, Remote
from r1sae_fast.fetch.verify import matches_etag
from r1sae_fast.progress import progress_bar
from r1sae_fast.r1.stream.sizes import show_size

PIECE = 16 << 20
"""Bytes of a range."""

StrPath = str | os.PathLike[str]


def fetch_features(
    name: str,
    sample: str | None,
    folder: StrPath,
    *,
    labels: bool = True,
    endpoint: str | None = None,
    jobs: int = 8,
    overwrite: bool = False,
    progress: bool | None = None,
) -> list[Path]:
    """Fetches a released feature database and its labels into ``folder/<name>``.

    Args:
        name: ``logic`` or ``math``.
        sample: ``0.1%``, ``1%``, ``10%`` or ``full`` of the tokens; None: labels alone.
        folder: where to; it is made.
        labels: whether to fetch autointerp.db too.
        endpoint: the S3 server, for mirrors; default: R1SAE_S3_ENDPOINT, else Amazon's.
        jobs: ranges at a time.
        overwrite: whether files that are not these objects may be replaced.
        progress: a bar on stderr; default: when stderr is a terminal.

    Returns:
        The files; :meth:`FeatureDB.open` takes the folder.

    Raises:
        FetchError: the object is not there, changed meanwhile, does not verify, or the server
            failed too often; the disk is too small (all sizes are checked first).
        FileExistsError: another file is in the place and ``overwrite`` is false.
        ValueError: no such database or sample, jobs below 1, or an endpoint that is no URL.
        MissingExtraError: obstore is not installed (extra ``fetch``).
    """
    wanted = keys(name, sample, labels=labels)
    bucket = Bucket(endpoint)
    files = [Path(folder) / key for key in wanted]
    remotes = [describe(bucket, key) for key in wanted]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    require_room(list(zip(files, remotes, strict=True)))
    for key, file, remote in zip(wanted, files, remotes, strict=True):
        fetch_object(bucket, key, file, remote, jobs=jobs, overwrite=overwrite, progress=progress)
    return files


def describe(bucket: Bucket, key: str) -> Remote:
    """Size and ETag of an object; raises as :func:`fetch_features`."""
    found: list[Remote] = []

    async def ask() -> None:
        found.append(await head(bucket, key))

    run(ask())
    return found[0]


def require_room(wanted: list[tuple[Path, Remote]]) -> None:
    """Refuses files that do not fit on the disk all together; what came before is counted.

    Raises:
        FetchError: too little room.
    """
    needed = sum(
        remote.size - _allocated(file.with_name(file.name + ".part"))
        for file, remote in wanted
        if not (file.exists() and file.stat().st_size == remote.size)
    )
    folder = wanted[0][0].parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        total = sum(remote.size for _, remote in wanted)
        raise FetchError(
            f"{folder}: {show_size(total)} are to be fetched, {show_size(needed)} of them still "
            f"missing, but {show_size(free)} are free; make room, choose another folder or a "
            "smaller sample"
        )


def fetch_object(
    bucket: Bucket,
    key: str,
    path: Path,
    remote: Remote,
    *,
    jobs: int = 8,
    piece: int = PIECE,
    overwrite: bool = False,
    progress: bool | None = None,
) -> bool:
    """Fetches one object to ``path``; False where it is there already. See :func:`fetch_features`.

    Files beside it while it is fetched: ``<path>.part``, ``<path>.part.jsonl``.
    """
    if jobs < 1 or piece < 1:
        raise ValueError(f"jobs is {jobs}, piece {piece}; expected at least 1")
    with building_lock(path, "fetching this file"):
        if path.exists() and not overwrite:
            if _is_it(path, remote, progress):
                _leftovers(path)
                return False
            raise FileExistsError(
                f"{path}: exists already, and is not {remote.name} as it is now "
                f"({show_size(remote.size)}); pass overwrite=True (--overwrite) to replace it"
            )
        journal = Journal(path, remote, piece)
        try:
            with progress_bar(
                f"fetching {path.name}", remote.size / 1e6, unit="MB", shown=progress
            ) as advance:
                done = sum(journal.check())
                advance(done / 1e6)

                def more(count: int) -> None:
                    nonlocal done
                    done += count
                    advance(done / 1e6)

                run(download(bucket, key, remote, journal, jobs, more))
        finally:
            journal.close()
        _finish(path, remote, journal, progress)
        return True


def _finish(path: Path, remote: Remote, journal: Journal, progress: bool | None) -> None:
    """Verifies what came, and puts it in its place."""
    if journal.part.stat().st_size != remote.size or not _verified(journal.part, remote, progress):
        journal.remove()
        raise FetchError(
            f"{path}: what came is not {remote.name}: its MD5 is not what the server's ETag "
            f"{remote.etag} says; it was removed: run the same again"
        )
    sync(journal.part)
    journal.part.replace(path)
    sync(path.parent)
    journal.remove()


def _is_it(path: Path, remote: Remote, progress: bool | None) -> bool:
    return (
        path.is_file() and path.stat().st_size == remote.size and _verified(path, remote, progress)
    )


def _verified(path: Path, remote: Remote, progress: bool | None) -> bool:
    """False only where the ETag tells that it is something else."""
    with progress_bar(
        f"verifying {path.name.removesuffix('.part')}", remote.size / 1e6, unit="MB", shown=progress
    ) as advance:
        return matches_etag(path, remote.etag, lambda n: advance(n / 1e6)) is not False


def _leftovers(path: Path) -> None:
    for suffix in (".part", ".part.jsonl"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _allocated(part: Path) -> int:
    """Bytes that a file with holes takes already."""
    try:
        status = part.stat()
    except FileNotFoundError:
        return 0
    return min(int(getattr(status, "st_blocks", 0)) * 512, status.st_size)


__all__ = ["describe", "fetch_features", "fetch_object", "require_room"]
