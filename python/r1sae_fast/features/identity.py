"""Of which SAE, model and layer a database is, and refusing what doesn't belong to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1sae_fast.errors import DatabaseError

if TYPE_CHECKING:
    from r1sae_fast.r1.engines.base import Engine
    from r1sae_fast.sae import FastSAE, Mode


@dataclass(frozen=True)
class Origin:
    """What a database's codes were made by; None where its ``meta`` does not say."""

    path: Path
    d_sae: int
    sae_fingerprint: str | None
    mode: Mode | None
    norm_limit: float | None
    model: str | None
    model_fingerprint: str | None
    layer: int | None

    @classmethod
    def read(cls, path: Path, d_sae: int, metadata: Mapping[str, str]) -> Origin:
        """From the table ``meta``."""
        codes = _read_json(metadata.get("codes_metadata"))
        activations = codes.get("activations")
        source: dict[str, Any] = activations if isinstance(activations, dict) else {}
        layer = source.get("layer", metadata.get("layer"))
        return cls(
            path,
            d_sae,
            _text(codes.get("sae_fingerprint", metadata.get("sae_fingerprint"))),
            codes.get("mode") if codes.get("mode") in ("topk", "batch_topk", "threshold") else None,
            float(codes["norm_limit"])
            if isinstance(codes.get("norm_limit"), (int, float))
            else None,
            _text(source.get("model", metadata.get("model"))),
            _text(source.get("model_fingerprint")),
            int(layer) if (layer := str(layer)).isdecimal() and len(layer) < 10 else None,
        )

    def require_sae(self, sae: FastSAE) -> None:
        """Raises DatabaseError if the database is of another SAE: d_sae or checksum differ."""
        from r1sae_fast.encode import fingerprint

        if sae.d_sae != self.d_sae:
            raise DatabaseError(
                f"{self.path}: of an SAE with d_sae = {self.d_sae}, this one has {sae.d_sae}; its "
                "features are other features: use the SAE that the codes were made by"
            )
        if self.sae_fingerprint is None:
            return  # a released file says nothing
        found = fingerprint(sae)
        if found != self.sae_fingerprint:
            raise DatabaseError(
                f"{self.path}: of the SAE with checksum {self.sae_fingerprint}, this one has "
                f"{found}: other weights or another threshold; use the SAE that the codes were "
                "made by"
            )

    def require_model(self, engine: Engine) -> None:
        """Raises DatabaseError if the database is of another model."""
        self.require_checkpoint(engine.name, engine.fingerprint)

    def require_checkpoint(self, name: str, fingerprint: str) -> None:
        """Raises DatabaseError if the database is of a model of another fingerprint."""
        if self.model_fingerprint and fingerprint and fingerprint != self.model_fingerprint:
            raise DatabaseError(
                f"{self.path}: of the model {self.model!r} with checksum "
                f"{self.model_fingerprint}, this is {name!r} with {fingerprint}; use that model"
            )


def require_same_sae(one: Origin, other: Origin) -> None:
    """Raises DatabaseError if two databases are of different SAEs."""
    same = one.d_sae == other.d_sae and (
        None in (one.sae_fingerprint, other.sae_fingerprint)
        or one.sae_fingerprint == other.sae_fingerprint
    )
    if not same:
        raise DatabaseError(
            f"{other.path} is of another SAE (d_sae {other.d_sae}, checksum "
            f"{other.sae_fingerprint or 'unknown'}) than {one.path} (d_sae {one.d_sae}, checksum "
            f"{one.sae_fingerprint or 'unknown'}): a feature of one is not that feature of the "
            "other; join databases of one SAE"
        )


def _read_json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
