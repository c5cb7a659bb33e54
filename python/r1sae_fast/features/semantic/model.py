"""The model that turns texts into vectors: a folder, a name in the hub's cache, or an object.

Nothing is fetched here: a name that is not in the cache is an error that says how to get it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from r1sae_fast.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from model2vec import StaticModel

Vectors = NDArray[np.float32]


@runtime_checkable
class TextEncoder(Protocol):
    """What has ``encode(texts) -> [texts, dimensions]``, as sentence-transformers' models have."""

    def encode(self, sentences: list[str], /) -> Any:
        """A vector for each text."""


@dataclass(frozen=True)
class TextModel:
    """A loaded model. ``checksum`` tells it from others; None for an object of unknown origin."""

    name: str
    checksum: str | None
    encoder: TextEncoder

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors ``[texts, dimensions]``; zeros for a text of which it knows nothing.

        Raises:
            ValueError: the model gives another shape, or numbers that are not finite.
        """
        found = np.asarray(self.encoder.encode(list(texts)), dtype=np.float32)
        if found.ndim != 2 or len(found) != len(texts):
            raise ValueError(
                f"{self.name}: gave an array {list(found.shape)} for {len(texts)} texts; "
                f"expected [{len(texts)}, dimensions]"
            )
        if not np.isfinite(found).all():
            raise ValueError(f"{self.name}: gave vectors with NaN or infinite numbers")
        # In float64: the square of a tiny or a large number is still one.
        norms = np.linalg.norm(found.astype(np.float64), axis=1, keepdims=True)
        unit: Vectors = (found / np.where(norms > 0, norms, 1)).astype(np.float32)
        return unit


def load_model(model: str | os.PathLike[str] | TextEncoder) -> TextModel:
    """Loads a static model (model2vec) from a folder or the hub's cache; takes an object as it is.

    Raises:
        MissingExtraError: model2vec is not installed.
        FileNotFoundError: no such folder, and no such name in the cache.
        CheckpointError: the folder holds no model that can be read.
    """
    if not isinstance(model, (str, os.PathLike)):
        if not isinstance(model, TextEncoder):
            raise TypeError(
                f"semantic is a {type(model).__name__}; expected a model's folder or name, or an "
                "object with encode(texts)"
            )
        return TextModel(type(model).__name__, None, model)
    static = _static_model()
    folder = _folder(os.fspath(model))
    try:
        loaded = static.from_pretrained(folder)
        return TextModel(str(model), _checksum(loaded), loaded)
    except Exception as error:  # noqa: BLE001  # safetensors and tokenizers raise bare Exception
        raise CheckpointError(
            f"{folder}: no static embedding model that model2vec can read ({error}){_hint(folder)}"
        ) from None


def _static_model() -> type[StaticModel]:
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise MissingExtraError(
            f"search by meaning needs model2vec ({error}); install it with: "
            "pip install 'r1sae-fast[search]'"
        ) from None
    return StaticModel


def _folder(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: a file; expected the folder of an embedding model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise FileNotFoundError(
            f"{name}: no such folder, and no model of that name in the Hugging Face cache; "
            "nothing is fetched unasked: get one with, for example, `hf download "
            "minishlab/potion-base-8M`"
        ) from None


def _hint(folder: Path) -> str:
    try:
        modules = json.loads((folder / "modules.json").read_text())
        kinds = [str(module["type"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if any(kind.endswith("Transformer") for kind in kinds):
        return (
            "; it is a transformer: in Python pass it loaded, "
            "search(text, semantic=SentenceTransformer(folder))"
        )
    return ""


def _checksum(model: StaticModel) -> str:
    """Of all that decides its vectors."""
    found = hashlib.blake2b(digest_size=16)
    arrays = {"embedding": model.embedding, "weights": model.weights, "map": model.token_mapping}
    settings: dict[str, Any] = {"normalize": model.normalize, "max_length": model.max_length}
    for name, array in arrays.items():
        if array is not None:
            settings[name] = [str(array.dtype), *array.shape]
            found.update(np.ascontiguousarray(array).data)
    found.update(json.dumps(settings, sort_keys=True).encode())
    found.update(model.tokenizer.to_str().encode())
    return found.hexdigest()
