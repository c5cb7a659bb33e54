"""Finding features by label and by token."""

from __future__ import annotations

from collections.abc import Container

from r1sae_fast.features.contexts import Fetch
from r1sae_fast.features.labels import MODEL_NAME, NEIGHBOUR_FACTOR
from r1sae_fast.features.results import SearchHit


def search(fetch: Fetch, tables: Container[str], text: str) -> list[SearchHit]:
    """One hit for each feature found, its best; the best feature first."""
    counted, labelled = "features" in tables, "autointerp" in tables
    count, clarity = ("f.count", "coalesce(f.clarity, 0)") if counted else ("NULL", "0.0")
    features = "LEFT JOIN features f ON f.feature_id = t.feature_id" if counted else ""
    rows = []
    if labelled:
        # Statistical labels are found by their tokens, below: their other words are always the
        # same.
        rows += fetch(
            f"SELECT t.feature_id, 'label', label, model_name, NULL, NULL, {count}, 1 + {clarity} "
            f"FROM autointerp t {features} "
            "WHERE contains(lower(label), lower(?)) AND model_name IS DISTINCT FROM ?",
            [text, MODEL_NAME],
        )
    if "token_lift" in tables:
        best_label = (
            "(SELECT feature_id, label, model_name FROM autointerp QUALIFY row_number() OVER "
            "(PARTITION BY feature_id ORDER BY model_name IS NOT DISTINCT FROM ?, label) = 1)"
            if labelled
            else "(SELECT NULL AS feature_id, NULL AS label, ? AS model_name WHERE false)"
        )
        rows += fetch(
            "SELECT t.feature_id, 'token', l.label, l.model_name, decoded_token, token_offset, "
            f"{count}, weighted_share / (CASE token_offset WHEN 0 THEN 1 ELSE ? END) "
            f"FROM token_lift t {features} "
            f"LEFT JOIN {best_label} l ON l.feature_id = t.feature_id "
            "WHERE lift > 1 AND contains(lower(decoded_token), lower(?))",
            [NEIGHBOUR_FACTOR, MODEL_NAME, text],
        )
    hits = [SearchHit(*row) for row in rows]
    best: dict[int, SearchHit] = {}
    for hit in sorted(hits, key=lambda hit: (-hit.score, hit.feature_id, hit.label or "")):
        best.setdefault(hit.feature_id, hit)
    return list(best.values())
