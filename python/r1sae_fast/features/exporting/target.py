"""What an export is called where it goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Names on Neuronpedia: the model, the layer, the set of SAEs, who made it.

    ``created``: an ISO time. ``sequences`` and ``edges`` (of the histogram's bins) are the
    database's, ``width`` the most tokens of a context.
    """

    model_id: str
    layer: int
    source_set: str
    creator: str
    created: str
    sequences: int
    width: int
    edges: tuple[float, ...] | None

    @property
    def source_id(self) -> str:
        """Neuronpedia's name for one SAE: the layer and the set."""
        return f"{self.layer}-{self.source_set}"
