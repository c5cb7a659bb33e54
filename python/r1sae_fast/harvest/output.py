"""What a harvest writes: residuals, or what an SAE on the engine's device makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.encode import describe_sae, encode_rows
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.r1.taps.selection import choose_attached_mode, selecting
from r1sae_fast.sae import FastSAE, Mode
from r1sae_fast.shards import ActivationWriter, CodeWriter
from r1sae_fast.shards.activations import dtype_name


@dataclass(frozen=True)
class AttachedSae:
    """An SAE that encodes the rows before they are written.

    Attributes:
        sae: on the engine's device.
        mode: how it chooses codes.
        norm_limit: rows of a larger norm get no codes; None: all are encoded.
    """

    sae: FastSAE
    mode: Mode
    norm_limit: float | None

    def describe(self) -> dict[str, Any]:
        """What decides the codes besides the rows."""
        return describe_sae(self.sae, self.mode, self.norm_limit)


def attach(
    engine: Engine, sae: FastSAE, mode: Mode | None, norm_limit: float | None
) -> AttachedSae:
    """Checks that the SAE fits the engine.

    Raises:
        ValueError: another width or device, or a mode in which codes would depend on the batches
            and that was not asked for.
    """
    if sae.d_in != engine.hidden_size:
        raise ValueError(
            f"the SAE has d_in {sae.d_in}, the model a residual stream of {engine.hidden_size}; "
            "give an SAE of this model"
        )
    if sae.device.type != engine.device.type:
        raise ValueError(
            f"the SAE lies on {sae.device}, the engine on {engine.device}; "
            f"use sae.to({str(engine.device)!r})"
        )
    return AttachedSae(sae, choose_attached_mode(sae, mode), norm_limit)


class Output:
    """The writer of a harvest's folder."""

    def __init__(self, writer: ActivationWriter | CodeWriter, attached: AttachedSae | None) -> None:
        self.writer = writer
        self._attached = attached

    def write(self, rows: Tensor, columns: dict[str, Tensor]) -> None:
        """Appends rows [n, d_in], which may be on any device."""
        if isinstance(self.writer, ActivationWriter):
            self.writer.write(rows.cpu(), **columns)
            return
        assert self._attached is not None
        with selecting(self._attached.sae, self._attached.mode):
            codes = encode_rows(self._attached.sae, rows, self._attached.norm_limit)
        self.writer.write(codes, **columns)


def stored_dtype(dtype: str | torch.dtype | None, attached: AttachedSae | None) -> str:
    """The dtype's name in the manifest; by default bfloat16 for activations, float32 for codes.

    Raises:
        ValueError: codes in anything but float32 or bfloat16.
    """
    if attached is None:
        return dtype_name("bfloat16" if dtype is None else dtype)
    name = str("float32" if dtype is None else dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {name}; codes are stored in float32 or bfloat16")
    return name


@contextlib.contextmanager
def open_output(
    folder: Path,
    engine: Engine,
    metadata: dict[str, Any],
    dtype: str,
    attached: AttachedSae | None,
    resume: bool,
) -> Iterator[Output]:
    """Shards that end where the harvest says, and nowhere else."""
    writer: ActivationWriter | CodeWriter
    if attached is None:
        writer = ActivationWriter(
            folder,
            engine.hidden_size,
            dtype,
            metadata,
            explicit_shards=True,
            resume=resume,
            check_finite=False,  # checked where the sequence can be named
        )
    else:
        d_sae = attached.sae.d_sae
        writer = CodeWriter(folder, d_sae, metadata, dtype, explicit_shards=True, resume=resume)
    with writer:
        yield Output(writer, attached)
