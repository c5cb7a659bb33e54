"""A run's state as one safetensors file, replaced whole: what a killed run goes on from.

There is no state of a random generator in it, since none outlives the initial weights: the order of
rows is a function of seed and place, and the loader's place is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from r1sae_fast.atomic import replacing
from r1sae_fast.errors import CheckpointError

FILE = "checkpoint.safetensors"
# Version 2 knows of rows that sleep (r1sae_fast.optim.Adam); in version 1 none does.
# Version 3 counts what the last step found.
_FORMAT, _VERSION, _READABLE = "r1sae-train", 3, (1, 2, 3)
_CENTRE = "standardisation.centre"


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

    def write(self, folder: Path) -> None:
        """Replaces ``folder``'s checkpoint; the old one stays until the new one is on the disk."""
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": self.identity,
            "counters": vars(self.counters),
            "loader": self.loader,
        }
        tensors = {name: tensor.detach().cpu() for name, tensor in self.tensors.items()}
        tensors[_CENTRE] = self.centre.cpu()
        with replacing(folder / FILE) as temporary:
            temporary.write_bytes(save(tensors, {"r1sae_train": json.dumps(header)}))

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint of ``folder``, or None where there is none.

        Raises:
            CheckpointError: truncated, or not one of ours.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("r1sae_train", "null")
                # Cloned: what is read here is written to, and its file is replaced.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            header = json.loads(text)
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
            counters = Counters(**header["counters"])
            return cls(
                header["identity"], counters, header["loader"], tensors.pop(_CENTRE), tensors
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); remove it to start this run anew"
            ) from None


def require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError that names the first setting in which two runs differ."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: this run was started with {name} = {found.get(name)!r}, not "
                f"{wanted.get(name)!r}; give the same, or another folder"
            )
