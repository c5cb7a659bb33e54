"""Goodfire's released R1 SAEs (github goodfire-ai/r1-interpretability; layer 37 of DeepSeek-R1).

Each file is the state dict of a tied BatchTopK SAE: ``W [d_in, d_sae]``, ``b_enc [d_sae]``,
``b_dec [d_in]``. It takes raw activations: no normalisation, and ``b_dec`` is not subtracted.
"""

from __future__ import annotations

import pickle
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from r1sae_fast.checkpoints import native
from r1sae_fast.errors import CheckpointError
from r1sae_fast.ops._memory import empty_weights
from r1sae_fast.sae import FastSAE, SaeConfig
from r1sae_fast.sae.config import check_dtype

__all__ = ["LOGIC_K", "MATH_K", "load_goodfire_sae", "load_logic_sae", "load_math_sae"]

MATH_K = 128
LOGIC_K = 64


def load_math_sae(
    path: str | PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> FastSAE:
    """The released math SAE (``math/DeepSeek-R1-SAE-l37.pt``, k = 128).

    The same codes as the release's ``load_math_sae(path)`` gives, to the index.

    Args:
        path: the downloaded ``.pt`` file.
        device, dtype: of the parameters; the release's defaults.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not that kind of file (nothing in it is executed), or a tensor is missing
            or of the wrong shape; names it.
    """
    return load_goodfire_sae(path, MATH_K, device, dtype)


def load_logic_sae(
    path: str | PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FastSAE:
    """The released logic SAE (``logic/DeepSeek-R1-SAE-l37.pt``, k = 64).

    Else as :func:`load_math_sae`.
    """
    return load_goodfire_sae(path, LOGIC_K, device, dtype)


def load_goodfire_sae(
    path: str | PathLike[str],
    k: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> FastSAE:
    """An SAE of any size in the release's format; it does not hold k. ``dtype`` None keeps its own.

    Raises:
        FileNotFoundError, CheckpointError: as :func:`load_math_sae`.
        ValueError: k out of range.
    """
    path = Path(path)
    state = _read(path)
    where = str(path)
    weight = state.get("W")
    if weight is None:
        found = ", ".join(sorted(state)) or "none"
        raise CheckpointError(f"{where} lacks W; found: {found}; expected W, b_enc and b_dec")
    if weight.dim() != 2 or 0 in weight.shape:
        raise CheckpointError(f"{where}: W has shape {tuple(weight.shape)}; expected (d_in, d_sae)")
    d_in, d_sae = weight.shape
    native.check_tensors(state, {"W": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)}, where)
    # Feature-major: decoding and rescoring read whole features. The one copy that is made.
    dtype = weight.dtype if dtype is None else dtype
    check_dtype(dtype)
    W_dec = empty_weights(d_sae, d_in, dtype=dtype, device=device)
    W_dec.copy_(weight.T)
    tensors = {"W_dec": W_dec, "b_enc": state["b_enc"], "b_dec": state["b_dec"]}
    config = SaeConfig(d_in, d_sae, k, "batch_topk", tied=True)
    return native.build(config, tensors, where, device, dtype)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a downloaded .pt file, such as "
            "math/DeepSeek-R1-SAE-l37.pt of Goodfire/DeepSeek-R1-SAE-l37 on the Hugging Face hub"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected a .pt file of the release")
    # What the system has against the file is its own error; from here on its content is to blame.
    path.open("rb").close()
    try:
        state = _load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain state dict: it holds other Python objects, or no pickle at "
            "all, and nothing in it was executed; expected Goodfire's .pt with W, b_enc and b_dec "
            f"({str(error).splitlines()[0]})"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Damaged pickles raise nearly anything.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} can't be read as a torch file ({reason}); it may be truncated, or of "
            "another kind: fetch it again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}; expected a dict of W, b_enc and b_dec"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}; expected a tensor"
            )
        if value.layout != torch.strided:
            raise CheckpointError(f"{path}: {name} is {value.layout}; expected a dense tensor")
    return dict(state)


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        # torch's format before 1.6, which can't be mapped.
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)
