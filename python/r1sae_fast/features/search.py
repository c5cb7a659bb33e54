"""Finding features by label and by token."""

from __future__ import annotations

from r1sae_fast.features.contexts import Fetch
from r1sae_fast.features.labelled import Columns, Who
from r1sae_fast.features.labels import MODEL_NAME, NEIGHBOUR_FACTOR
from r1sae_fast.features.query.columns import best_labels
from r1sae_fast.features.query.ranking import bm25, closeness, words_of
from r1sae_fast.features.results import SearchHit


def search(fetch: Fetch, tables: Columns, text: str, chosen: Who | None) -> list[SearchHit]:
    """One hit for each feature found, the best feature first.

    Its score is its best label's, from 0 to 2, plus its best tokens', from 0 to 1.
    """
    parts = words_of(text)
    by_label = _labels(fetch, tables, parts) if "autointerp" in tables else {}
    by_token = _tokens(fetch, tables, parts) if "token_lift" in tables else {}
    found = sorted(by_label.keys() | by_token.keys())
    if not found:
        return []
    shown, counts = _shown(fetch, tables, found, chosen)
    hits = []
    for feature in found:
        label_score, label, model = by_label.get(feature, (0.0, *shown.get(feature, (None, None))))
        token_score, token, offset = by_token.get(feature, (0.0, None, None))
        matched = "label" if feature in by_label else "token"
        score = label_score + token_score
        count = counts.get(feature)
        hits.append(SearchHit(feature, matched, label, model, token, offset, count, score))
    return sorted(hits, key=lambda hit: (-hit.score, hit.feature_id))


def _labels(
    fetch: Fetch, tables: Columns, parts: list[str]
) -> dict[int, tuple[float, str, str | None]]:
    """Each feature's best label with any of the parts. Statistical labels are found by their
    tokens instead: their other words are always the same."""
    written = "FROM autointerp a WHERE model_name IS DISTINCT FROM ?"
    any_part = " OR ".join(["contains(lower(label), ?)"] * len(parts))
    rows = fetch(
        f"SELECT feature_id, label, model_name, lower(label) {written} AND ({any_part})",
        [MODEL_NAME, *parts],
    )
    if not rows:
        return {}
    total, mean = fetch(f"SELECT count(*), avg(length(label)) {written}", [MODEL_NAME])[0]
    scores = bm25(parts, [row[3] for row in rows], total, mean)
    best: dict[int, tuple[float, str, str | None]] = {}
    for (feature, label, model, lowered), score in zip(rows, scores, strict=True):
        share = sum(part in lowered for part in parts) / len(parts)
        # A label that holds all words is above any token; BM25 orders the labels among them.
        bounded = share * (1 + score / (1 + score))
        if feature not in best or (-bounded, label) < (-best[feature][0], best[feature][1]):
            best[feature] = (bounded, label, model)
    return best


def _tokens(fetch: Fetch, tables: Columns, parts: list[str]) -> dict[int, tuple[float, str, int]]:
    """The tokens that features fire on, or beside: the sum over parts of the best of each."""
    any_part = " OR ".join(["contains(lower(decoded_token), ?)"] * len(parts))
    rows = fetch(
        "SELECT feature_id, token_offset, decoded_token, lower(decoded_token), weighted_share "
        f"FROM token_lift WHERE lift > 1 AND ({any_part})",
        parts,
    )
    found: dict[int, dict[str, tuple[float, str, int]]] = {}
    for feature, offset, token, lowered, share in rows:
        weight = (share or 0.0) / (1.0 if offset == 0 else NEIGHBOUR_FACTOR)
        for part in parts:
            if part not in lowered:
                continue
            # A token may be white space or signs alone: then it is what was asked for.
            score = weight * min(closeness(part, lowered), 1.0) / len(parts)
            best = found.setdefault(feature, {})
            if part not in best or (-score, abs(offset)) < (-best[part][0], abs(best[part][2])):
                best[part] = (score, token, offset)
    result = {}
    for feature, best in found.items():
        _, token, offset = max(best.values(), key=lambda hit: hit[0])
        result[feature] = (sum(hit[0] for hit in best.values()), token, offset)
    return result


def _shown(
    fetch: Fetch, tables: Columns, features: list[int], chosen: Who | None
) -> tuple[dict[int, tuple[str | None, str | None]], dict[int, int]]:
    """The label to show for a feature that was found by its tokens, and all features' counts."""
    wanted = "WHERE feature_id IN (SELECT unnest(?::INTEGER[]))"
    labels = fetch(
        f"SELECT feature_id, label, model_name FROM ({best_labels(tables, chosen)}) {wanted}",
        [features],
    )
    counts = (
        fetch(f"SELECT feature_id, count FROM features {wanted}", [features])
        if "features" in tables
        else []
    )
    return {row[0]: (row[1], row[2]) for row in labels}, {row[0]: row[1] for row in counts}
