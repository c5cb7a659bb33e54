"""SAEs by name: a folder, a released file, or a repository of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import torch

from r1sae_fast.checkpoints import goodfire, native
from r1sae_fast.errors import CheckpointError
from r1sae_fast.sae import FastSAE

__all__ = ["GOODFIRE_FILE", "GOODFIRE_REPO", "Source", "fetch", "load"]

GOODFIRE_REPO = "Goodfire/DeepSeek-R1-SAE-l37"
GOODFIRE_FILE = "DeepSeek-R1-SAE-l37.pt"


@dataclass(frozen=True)
class Source:
    """Where in a repository, which state of it, and how to get there (huggingface_hub's terms)."""

    subfolder: str | None = None
    revision: str | None = None
    cache_dir: str | PathLike[str] | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    local_dir: str | PathLike[str] | None = None
    endpoint: str | None = None


def load(
    repo_or_path: str | PathLike[str],
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> FastSAE:
    """See :meth:`FastSAE.from_pretrained`."""
    path = Path(repo_or_path)
    if path.is_dir():
        return native.load(path / (source.subfolder or ""), device, dtype)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; expected a folder that FastSAE.save wrote. For Goodfire's .pt "
            "files use load_math_sae or load_logic_sae (the file doesn't hold k)"
        )
    repo = fspath(repo_or_path)
    if repo == GOODFIRE_REPO:
        return _load_goodfire(source, device, dtype)
    config = fetch(repo, native.CONFIG_FILE, source)
    fetch(repo, native.WEIGHTS_FILE, source)
    return native.load(config.parent, device, dtype)


def _load_goodfire(
    source: Source, device: torch.device | str, dtype: torch.dtype | None
) -> FastSAE:
    loaders = {"math": goodfire.load_math_sae, "logic": goodfire.load_logic_sae}
    if source.subfolder not in loaders:
        raise ValueError(
            f'{GOODFIRE_REPO} holds two SAEs; expected subfolder="math" or "logic", '
            f"found {source.subfolder!r}"
        )
    path = fetch(GOODFIRE_REPO, GOODFIRE_FILE, source)
    loader = loaders[source.subfolder]
    return loader(path, device) if dtype is None else loader(path, device, dtype)


def fetch(repo: str, name: str, source: Source) -> Path:
    """A file of a repository, from the cache where it is there.

    Raises:
        CheckpointError: it can't be had; says why.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(
            hf_hub_download(
                repo,
                name,
                subfolder=source.subfolder,
                revision=source.revision,
                cache_dir=None if source.cache_dir is None else fspath(source.cache_dir),
                local_files_only=source.local_files_only,
                token=source.token,
                local_dir=None if source.local_dir is None else fspath(source.local_dir),
                endpoint=source.endpoint,
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is neither a folder here nor the name of a repository (owner/name); "
            "check the spelling"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} of {repo} is not in the local cache and the Hugging Face hub can't be asked "
            "(offline, or no connection); connect once, or give the path of a folder"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is neither a folder here nor a repository on the Hugging Face hub "
            "(if it is private, log in with `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {source.revision!r}") from error
    except errors.EntryNotFoundError as error:
        inside = f"/{source.subfolder}" if source.subfolder else ""
        raise CheckpointError(
            f"{repo}{inside} has no {name}; expected what FastSAE.save writes"
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(f"{name} of {repo} can't be fetched: {error}") from error
