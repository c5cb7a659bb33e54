"""What an SAE is, without its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from r1sae_fast.errors import CheckpointError

__all__ = ["MODES", "Mode", "SaeConfig", "check_dtype"]

Mode = Literal["topk", "batch_topk", "threshold"]
MODES: tuple[Mode, ...] = get_args(Mode)

FORMAT = "r1sae-sae"
# Of version 2 are transcoders, which readers of version 1 would take for autoencoders.
VERSIONS = (1, 2)
_INT32_MAX = 2**31 - 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises TypeError unless an SAE's parameters can have this dtype."""
    if dtype not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise TypeError(f"dtype is {dtype}; expected one of {names}")


@dataclass(frozen=True)
class SaeConfig:
    """The shape of an SAE and how it selects; checked on construction.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range; k above d_sae among them.
    """

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of features (latents)."""
    k: int
    """Codes a row: exactly for topk, on average for batch_topk, the aim of calibration for
    threshold."""
    mode: Mode = "batch_topk"
    """How pre-activations become codes."""
    tied: bool = False
    """Whether W_enc is W_dec transposed (one storage)."""
    transcoder: bool = False
    """Whether it makes another activation of what it reads, and not that again."""
    skip_connection: bool = False
    """Whether a transcoder has W_skip, ``[d_in, d_in]``."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; expected an int")
        for name in ("d_in", "d_sae"):
            value = getattr(self, name)
            if not 1 <= value <= _INT32_MAX:
                raise ValueError(f"{name} is {value}; expected 1 to {_INT32_MAX}")
        if not 0 <= self.k <= self.d_sae:
            raise ValueError(f"k is {self.k}; expected 0 to d_sae = {self.d_sae}")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        for name in ("tied", "transcoder", "skip_connection"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a bool")
        if self.transcoder and self.tied:
            raise ValueError("tied and transcoder are True; a transcoder's matrices are two")
        if self.skip_connection and not self.transcoder:
            raise ValueError("skip_connection is True; expected transcoder to be True as well")

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``config.json``."""
        data = {"format": FORMAT, "version": 2 if self.transcoder else 1, **asdict(self)}
        if not self.transcoder:  # as readers of version 1 know it
            del data["transcoder"], data["skip_connection"]
        return data

    @classmethod
    def from_json(cls, data: object, where: str) -> SaeConfig:
        """The reverse of :meth:`to_json`; other keys are passed over.

        Raises:
            CheckpointError: no SAE's config, one of a later version, or a bad field; opens with
                ``where``.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(
                f'{where} is not the config of an SAE: found format {found!r}, expected "{FORMAT}"'
            )
        version = data.get("version")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{where} has version {version!r}; this release reads versions up to "
                f"{max(VERSIONS)}, so a newer r1sae-fast may be needed"
            )
        # Version 1 had no transcoders.
        later = ("transcoder", "skip_connection")
        names = [field.name for field in fields(cls) if field.name in data]
        missing = [
            field.name
            for field in fields(cls)
            if field.name not in data and (field.name not in later or version > 1)
        ]
        if missing:
            raise CheckpointError(f"{where} lacks {', '.join(missing)}")
        try:
            return cls(**{name: data[name] for name in names})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from error
