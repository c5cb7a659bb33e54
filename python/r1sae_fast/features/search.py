"""Finding features by label and by token."""

from __future__ import annotations

from collections.abc import Container

from r1sae_fast.features.contexts import Fetch
from r1sae_fast.features.results import SearchHit


def search(fetch: Fetch, tables: Container[str], text: str) -> list[SearchHit]:
    """One hit for each feature found, its best; the best feature first."""
    counted = "features" in tables
    count, clarity = ("f.count", "coalesce(f.clarity, 0)") if counted else ("NULL", "0.0")
    join = "LEFT JOIN features f USING (feature_id)" if counted else ""
    rows = []
    if "autointerp" in tables:
        rows += fetch(
            f"SELECT feature_id, 'label', label, model_name, NULL, {count}, 1 + {clarity} "
            f"FROM autointerp {join} WHERE contains(lower(label), lower(?))",
            [text],
        )
    if "token_lift" in tables:
        rows += fetch(
            "SELECT feature_id, 'token', NULL, NULL, arg_max(decoded_token, share), "
            f"any_value({count}), max(share) "
            f"FROM token_lift t {join} WHERE token_offset = 0 AND lift > 1 "
            "AND contains(lower(decoded_token), lower(?)) GROUP BY feature_id",
            [text],
        )
    hits = [SearchHit(*row) for row in rows]
    best: dict[int, SearchHit] = {}
    for hit in sorted(hits, key=lambda hit: (-hit.score, hit.feature_id, hit.label or "")):
        best.setdefault(hit.feature_id, hit)
    return list(best.values())
