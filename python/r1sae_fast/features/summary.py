"""What is known of one feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """A row of ``autointerp``: what a model, or counting (``model_name`` "statistics"), says."""

    label: str
    quality: float | None
    interestingness: float | None
    model_name: str | None
    prompt_version: str | None

    @property
    def statistical(self) -> bool:
        """Whether it was counted and not interpreted."""
        return self.model_name == "statistics"


@dataclass(frozen=True)
class FeatureSummary:
    """A feature's statistics and labels. Fields that the file has no statistics for are None.

    ``histogram`` counts activations by strength, between :meth:`FeatureDB.histogram_edges`.
    ``segment_density``: in which share of each segment's tokens the feature is active.
    """

    feature_id: int
    count: int
    density: float | None
    mean: float | None
    max: float
    histogram: tuple[int, ...] | None
    segment_density: Mapping[str, float | None]
    clarity: float | None
    labels: tuple[Label, ...]
