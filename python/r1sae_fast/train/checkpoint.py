"""A run's state as one safetensors file, replaced whole: what a killed run goes on from.

There is no state of a random generator in it, since none outlives the initial weights: the order of
rows is a function of seed and place, and the loader's place is kept.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1sae_fast.atomic import replacing
from r1sae_fast.errors import CheckpointError
from r1sae_fast.ops._memory import copy_on_demand
from r1sae_fast.train.parallel import ALONE, Ranks

FILE = "checkpoint.safetensors"
# Version 2 knows of rows that sleep (r1sae_fast.optim.Adam); in version 1 none does.
# Version 3 counts what the last step found.
# Version 4 has transcoders.
# Version 5 knows of rows that rest: moments that are yet to be multiplied by what they missed.
_FORMAT, _VERSION, _READABLE = "r1sae-train", 5, (1, 2, 3, 4, 5)
_METADATA = "r1sae_train"
_CENTRE, _TARGET_CENTRE = "standardisation.centre", "standardisation.target_centre"
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}
_VECTORS = {"b_enc", "log_threshold"}
_SPLIT = {"encoder", "decoder", *_VECTORS, "unfired_tokens"}


def lies_with_features(name: str) -> bool:
    """Whether the tensor of this name has an entry a feature, and so is split among ranks."""
    parts = name.split(".")
    if parts[0] != "adam":
        return name in _SPLIT
    # To Adam a vector is one row, which sleeps or does not.
    asleep = parts[2] == "asleep" and parts[1] not in _VECTORS
    return parts[1] in _SPLIT and (parts[2] in ("exp_avg", "exp_avg_sq") or asleep)


@dataclass
class Counters:
    """Where a run is, besides its tensors."""

    step: int = 0
    tokens: int = 0
    """Rows trained on."""
    left_out: int = 0
    """Rows not trained on, as outliers."""
    threshold: float = 0.0
    threshold_weight: float = 0.0
    scale: float = 1.0
    norm_limit: float = 0.0
    target_scale: float = 1.0
    target_norm_limit: float = 0.0
    """Of a transcoder."""
    l0: float = 0.0
    found: float = 0.0
    """See :class:`r1sae_fast.train.step.Learner`."""


@dataclass
class Checkpoint:
    """What is kept. ``identity`` must be equal for a run to go on from it."""

    identity: dict[str, Any]
    counters: Counters
    loader: dict[str, Any]
    centre: Tensor
    tensors: dict[str, Tensor]
    target_centre: Tensor | None = None
    """Of a transcoder."""

    def write(self, folder: Path, ranks: Ranks = ALONE) -> None:
        """Replaces ``folder``'s checkpoint; the old one stays until the new one is on the disk.

        All ``ranks`` call it, the first one writes: piece by piece, so that the whole is never in
        memory.
        """
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": self.identity,
            "counters": vars(self.counters),
            "loader": self.loader,
        }
        centres = {_CENTRE: self.centre}
        if self.target_centre is not None:
            centres[_TARGET_CENTRE] = self.target_centre
        # Long numbers first, so that all are aligned.
        tensors = dict(
            sorted(
                (self.tensors | centres).items(),
                key=lambda named: (-named[1].dtype.itemsize, named[0]),
            )
        )
        if not ranks.is_first:
            for name, tensor in tensors.items():
                deque(ranks.pieces(tensor, split=lies_with_features(name)), maxlen=0)
            return
        text = _file_header(tensors, self.identity["d_sae"], {_METADATA: json.dumps(header)})
        with replacing(folder / FILE) as temporary, temporary.open("wb") as file:
            file.write(text)
            for name, tensor in tensors.items():
                for piece in ranks.pieces(tensor, split=lies_with_features(name)):
                    file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)

    @classmethod
    def read(
        cls, folder: Path, ranks: Ranks = ALONE, only: Collection[str] | None = None
    ) -> Checkpoint | None:
        """The checkpoint of ``folder``, or None where there is none.

        Args:
            folder: of the run.
            ranks: of what lies with the features, this rank's share is read.
            only: names of the tensors that are read; default all.

        Raises:
            CheckpointError: truncated, or not one of ours.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = _checked(path, json.loads((file.metadata() or {}).get(_METADATA, "null")))
                start, stop = ranks.own(header["identity"]["d_sae"])
                tensors = {}
                for name in file.keys():  # noqa: SIM118
                    if only is not None and name not in {*only, _CENTRE, _TARGET_CENTRE}:
                        continue
                    # Copied: what is read here is written to, and its file is replaced.
                    if lies_with_features(name):
                        tensors[name] = copy_on_demand(file.get_slice(name)[start:stop])
                    else:
                        tensors[name] = file.get_tensor(name).clone()
            counters = Counters(**header["counters"])
            centre, aim = tensors.pop(_CENTRE), tensors.pop(_TARGET_CENTRE, None)
            return cls(header["identity"], counters, header["loader"], centre, tensors, aim)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); remove it to start this run anew"
            ) from None


def _checked(path: Path, header: Any) -> dict[str, Any]:
    """The header, of a kind and version that can be read."""
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: not a training checkpoint of this package; "
            "remove it, or train into another folder"
        )
    if header.get("version") not in _READABLE:
        raise CheckpointError(
            f"{path}: version {header.get('version')!r}; this package reads {_READABLE}; "
            "go on with the package that wrote it"
        )
    return header


def _file_header(tensors: dict[str, Tensor], d_sae: int, metadata: dict[str, str]) -> bytes:
    """What stands before the tensors in a safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if lies_with_features(name):
            shape[0] = d_sae
        end = at + math.prod(shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError that names the first setting in which two runs differ."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: this run was started with {name} = {found.get(name)!r}, not "
                f"{wanted.get(name)!r}; give the same, or another folder"
            )
