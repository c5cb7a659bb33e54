"""Which features are to be labelled, and what was done before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB


def select(db: FeatureDB, features: Sequence[int] | None) -> list[int]:
    """The features asked for, or all that are alive, in ascending order.

    Raises:
        DatabaseError: a database that has no table of features: a released one as it came.
        ValueError: no such feature.
    """
    if "meta" not in db.tables:
        raise DatabaseError(
            f"{db.path}: a released database as it came: its activations are not sorted by "
            "feature, and it can't hold labels; import it first (r1sae features import)"
        )
    if features is None:
        table = db.sql("SELECT DISTINCT feature_id FROM activations ORDER BY feature_id")
        return [int(feature) for feature in table["feature_id"].to_pylist()]
    for feature in features:
        if not 0 <= feature < db.d_sae:
            raise ValueError(
                f"no feature {feature} in {db.path}: it has {db.d_sae:,}, 0 to {db.d_sae - 1}"
            )
    return sorted({int(feature) for feature in features})


def some_of(features: Sequence[int], count: int, seed: int) -> list[int]:
    """A random choice; a larger one holds a smaller one, so that labels are never wasted."""

    def draw(feature: int) -> bytes:
        return hashlib.sha256(f"{seed} {feature}".encode()).digest()

    return sorted(sorted(features, key=draw)[:count])


def labelled(db: FeatureDB, model: str, version: str) -> set[int]:
    """What this labeller has labelled in the database."""
    if "autointerp" not in db.tables:
        return set()
    table = db.sql(
        "SELECT feature_id FROM autointerp WHERE model_name = ? AND prompt_version = ?",
        [model, version],
    )
    return set(table["feature_id"].to_pylist())


def spent_before(db: FeatureDB, model: str, version: str) -> float:
    """What this labeller's labels in the database have cost."""
    if "label_usage" not in db.tables:
        return 0.0
    table = db.sql(
        "SELECT coalesce(sum(cost), 0.0) AS cost FROM label_usage "
        "WHERE model_name = ? AND prompt_version = ?",
        [model, version],
    )
    return float(table["cost"][0].as_py())
