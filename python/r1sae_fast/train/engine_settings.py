"""The table ``[data]`` of a run's file: which engine makes the rows, from which texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from r1sae_fast.train.engine_rows import EngineRows

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class EngineSettings:
    """What is given to :class:`EngineRows`, in words.

    Args:
        engine: a checkpoint's folder, or "tiny-r1".
        texts: a ``.txt`` or ``.jsonl`` file.
        layer: block whose output is trained on.
        dtype: "bfloat16" or "float32", of the model.
        buffer_rows: see :class:`EngineRows`.
        batch_size: sequences that run together.

    Raises:
        TypeError, ValueError: a setting out of its range, named.
    """

    engine: str
    texts: str
    layer: int
    dtype: str = "bfloat16"
    buffer_rows: int = 1 << 17
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("engine", "texts"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a name")
        for name in ("layer", "buffer_rows", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; expected an int")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(_DTYPES)}")

    def open(self, beside: Path, device: str = "cpu") -> EngineRows:
        """Loads the model up to the layer.

        Args:
            beside: folder that ``texts``, and ``engine`` if there is such a folder, are relative
                to.
            device: the model's.
        """
        from r1sae_fast.r1 import LocalEngine

        folder = beside / self.engine
        engine = LocalEngine.from_pretrained(
            folder if folder.is_dir() else self.engine,
            dtype=_DTYPES[self.dtype],
            device=device,
            last_layer=self.layer,
        )
        return EngineRows(
            engine,
            beside / self.texts,
            self.layer,
            buffer_rows=self.buffer_rows,
            batch_size=self.batch_size,
        )
