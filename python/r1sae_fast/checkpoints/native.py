"""Our own format: a folder with ``sae.safetensors`` and ``config.json``.

``sae.safetensors`` holds ``W_dec [d_sae, d_in]``, ``b_enc [d_sae]``, ``b_dec [d_in]``,
``threshold`` (float32, ``[]`` or ``[d_sae]``), unless tied ``W_enc [d_in, d_sae]``, and of a
transcoder with a skip connection ``W_skip [d_in, d_in]``; its header
carries the config as well, so that one rename replaces an SAE whole. ``config.json`` is the copy
for people and for the hub; where the two differ (a crash between the renames, or an edit by hand),
the header counts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1sae_fast.atomic import replacing, write_bytes
from r1sae_fast.errors import CheckpointError
from r1sae_fast.ops._memory import empty_weights, on_large_pages
from r1sae_fast.sae import FastSAE, SaeConfig
from r1sae_fast.sae.config import check_dtype

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "build", "load", "save"]

WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "config.json"
_HEADER_KEY = "r1sae_config"


def save(sae: FastSAE, directory: str | PathLike[str]) -> None:
    """Writes ``sae`` into ``directory``, which is made where missing.

    Raises:
        TypeError: ``sae.metadata`` is not JSON.
        OSError: the folder can't be made or written; what was there before still is.
    """
    folder = Path(directory)
    data = {**sae.config.to_json(), "dtype": str(sae.dtype).removeprefix("torch.")}
    data["metadata"] = sae.metadata
    text = json.dumps(data, indent=2, allow_nan=False)
    tensors = {name: tensor.detach().contiguous() for name, tensor in sae.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)

    try:
        with replacing(folder / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary, metadata={_HEADER_KEY: text, "format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS_FILE} can't be written: {error}") from error
    write_bytes(folder / CONFIG_FILE, (text + "\n").encode())


def load(
    directory: str | PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> FastSAE:
    """Reads what :func:`save` wrote; on the CPU weights of the wanted dtype are mapped, not copied.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: incomplete or damaged; names the file or the tensor.
    """
    folder = Path(directory)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; expected a folder with {WEIGHTS_FILE}")
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}; expected what FastSAE.save writes")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or is truncated ({error}); fetch or save it again"
        ) from error
    data = _read_config(folder, header.get(_HEADER_KEY))
    config = SaeConfig.from_json(data, f"the config of {path}")
    sae = build(config, tensors, str(path), device, dtype)
    metadata = data.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"the metadata of {path} is {metadata!r}; expected an object")
    sae.metadata = metadata
    return sae


def _read_config(folder: Path, in_header: str | None) -> dict[str, Any]:
    beside = folder / CONFIG_FILE
    in_file = beside.read_bytes() if beside.is_file() else None
    if in_header is None and in_file is None:
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}, nor a config inside {WEIGHTS_FILE}")
    if in_header is None:
        return _parse(in_file or b"", str(beside))
    data = _parse(in_header.encode(), f"the header of {folder / WEIGHTS_FILE}")
    if in_file is not None and _parse(in_file, str(beside)) != data:
        warnings.warn(
            f"{beside} differs from the config inside {WEIGHTS_FILE} (a save that was cut short, "
            "or an edit by hand); the latter is used. To change k or mode, set them and save again",
            stacklevel=4,
        )
    return data


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is {type(data).__name__}; expected a JSON object")
    return data


def build(
    config: SaeConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> FastSAE:
    """An SAE around ``tensors``, without a copy where device, dtype and layout allow.

    Args:
        tensors: W_dec, b_enc, b_dec, W_enc unless tied, W_skip where there is a skip connection,
            and perhaps threshold.
        where: opens the messages.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or not floating.
        TypeError: a dtype that no SAE has.
    """
    d_in, d_sae = config.d_in, config.d_sae
    expected = {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    if not config.tied:
        expected["W_enc"] = (d_in, d_sae)
    if config.skip_connection:
        expected["W_skip"] = (d_in, d_in)
    check_tensors(tensors, expected, where, optional=("threshold",))
    dtype = tensors["W_dec"].dtype if dtype is None else dtype
    check_dtype(dtype)
    state = {name: tensors[name].to(device=device, dtype=dtype) for name in expected}
    state["W_dec"] = on_large_pages(state["W_dec"])
    if not config.tied:
        # Feature-major in memory; see FastSAE.
        W_enc = empty_weights(d_sae, d_in, dtype=dtype, device=device)
        state["W_enc"] = W_enc.copy_(state["W_enc"].T).T
    threshold = tensors.get("threshold")
    if threshold is not None:
        if tuple(threshold.shape) not in ((), (d_sae,)):
            raise CheckpointError(
                f"{where}: threshold has shape {tuple(threshold.shape)}; expected () or ({d_sae},)"
            )
        state["threshold"] = threshold.to(device=device, dtype=torch.float32)
    return FastSAE.from_tensors(config, **state)


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    optional: tuple[str, ...] = (),
) -> None:
    """Raises CheckpointError unless just these are there, floating and of their shape."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        found = ", ".join(sorted(tensors)) or "none"
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; found tensors: {found}")
    unknown = sorted(set(tensors) - set(expected) - set(optional))
    if unknown:
        raise CheckpointError(
            f"{where} holds {', '.join(unknown)} besides; expected only {', '.join(expected)}"
        )
    for name, tensor in tensors.items():
        shape = expected.get(name, tuple(tensor.shape))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}; expected {shape}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}; expected a floating dtype")
