"""The released SAEs' weights, from the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from r1sae_fast.checkpoints.hub import GOODFIRE_FILE, GOODFIRE_REPO, Source, fetch
from r1sae_fast.errors import FetchError
from r1sae_fast.fetch.catalogue import SETS
from r1sae_fast.r1.stream.sizes import show_size


def fetch_weights(
    name: str, folder: str | os.PathLike[str], *, endpoint: str | None = None
) -> Path:
    """Fetches ``<name>/DeepSeek-R1-SAE-l37.pt`` (1.2 GB) into ``folder``; huggingface_hub's part.

    It shows progress, goes on where it was cut, verifies and renames. What is there already is not
    fetched again. ``load_logic_sae`` or ``load_math_sae`` reads the file.

    Args:
        name: ``logic`` or ``math``.
        folder: where to; it is made.
        endpoint: a mirror of the hub; default: HF_ENDPOINT, else the hub itself.

    Raises:
        ValueError: no such SAE.
        FetchError: the disk is too small.
        CheckpointError: the hub can't be reached or doesn't have it.
    """
    if name not in SETS:
        raise ValueError(f"no released SAE {name!r}; expected {' or '.join(SETS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name / GOODFIRE_FILE).exists():
        _require_room(name, folder, endpoint)
    source = Source(subfolder=name, token=False, local_dir=folder, endpoint=endpoint)
    return fetch(GOODFIRE_REPO, GOODFIRE_FILE, source)


def _require_room(name: str, folder: Path, endpoint: str | None) -> None:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(GOODFIRE_REPO, GOODFIRE_FILE, subfolder=name, endpoint=endpoint)
    try:
        size = get_hf_file_metadata(url, token=False, endpoint=endpoint).size
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, ValueError):
        return  # the download itself has the better word for it
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        raise FetchError(
            f"{folder}: {GOODFIRE_FILE} takes {show_size(size)}, but {show_size(free)} are free; "
            "make room or choose another folder"
        )
