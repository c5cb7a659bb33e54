"""Many features' pages of data, a batch of features at a time: one query for all their contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from r1sae_fast.features.contexts import Fetch
from r1sae_fast.features.labelled import Columns, Who
from r1sae_fast.features.query.columns import statistics_query
from r1sae_fast.features.text import harmless

TOP = -1
"""The interval's number of the strongest examples."""


@dataclass(frozen=True)
class Context:
    """An example with the tokens around it: texts, ids and strengths side by side.

    ``interval``: TOP, or the number of the interval that it was drawn from, with its ``low``,
    ``high`` and ``share`` of the activations. ``token_idx``: the example's place in its sequence,
    ``peak``: which of the tokens it is.
    """

    interval: int
    low: float
    high: float
    share: float
    sequence_id: int
    token_idx: int
    peak: int
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Page:
    """What is exported of a feature; ``row``: its columns of :attr:`FeatureDB.statistics`."""

    feature_id: int
    row: dict[str, Any]
    histogram: tuple[int, ...] | None
    labels: tuple[tuple[str, str | None, str | None], ...]
    neighbours: tuple[tuple[int, float], ...]
    contexts: tuple[Context, ...]


def pages(
    fetch: Fetch,
    tables: Columns,
    features: Sequence[int],
    *,
    n: int,
    window: int,
    who: Who | None,
    batch: int,
) -> Iterator[list[Page]]:
    """The pages of ``features``, so many at a time, in their order."""
    for start in range(0, len(features), batch):
        chosen = [int(feature) for feature in features[start : start + batch]]
        yield _batch(fetch, tables, chosen, n, window, who)


def _batch(
    fetch: Fetch, tables: Columns, features: list[int], n: int, window: int, who: Who | None
) -> list[Page]:
    chosen = f"feature_id IN ({', '.join(map(str, features))})"
    rows = _rows(fetch, tables, who, chosen)
    histograms: dict[int, list[int] | None] = (
        dict(fetch(f"SELECT feature_id, histogram FROM features WHERE {chosen}"))
        if "histogram" in tables.get("features", ())
        else {}
    )
    labels = _grouped(
        fetch(
            "SELECT feature_id, label, model_name, prompt_version FROM autointerp "
            f"WHERE {chosen} ORDER BY ALL"
        )
        if "autointerp" in tables
        else []
    )
    neighbours = _grouped(
        fetch(
            f"SELECT feature_id, other_id, cosine FROM neighbours WHERE {chosen} "
            "ORDER BY feature_id, rank"
        )
        if "neighbours" in tables
        else []
    )
    contexts = _contexts(fetch, tables, chosen, n, window)
    return [
        Page(
            feature,
            rows.get(feature, {"feature_id": feature, "count": 0, "max": 0.0}),
            None if (histogram := histograms.get(feature)) is None else tuple(histogram),
            tuple(
                (harmless(text), None if model is None else harmless(model), version)
                for text, model, version in labels.get(feature, ())
            ),
            tuple(neighbours.get(feature, ())),
            tuple(contexts.get(feature, ())),
        )
        for feature in features
    ]


def _rows(fetch: Fetch, tables: Columns, who: Who | None, chosen: str) -> dict[int, dict[str, Any]]:
    query = statistics_query(tables, who)
    names = [row[0] for row in fetch(f"SELECT column_name FROM (DESCRIBE ({query}))")]
    found = fetch(f"SELECT * FROM ({query}) WHERE {chosen}")
    rows: dict[int, dict[str, Any]] = {}
    for values in found:
        row: dict[str, Any] = dict(zip(names, values, strict=True))
        rows[row["feature_id"]] = {
            name: harmless(value) if isinstance(value, str) else value
            for name, value in row.items()
        }
    return rows


def _contexts(
    fetch: Fetch, tables: Columns, chosen: str, n: int, window: int
) -> dict[int, list[Context]]:
    top = (
        f"SELECT feature_id, rank, sequence_id, token_idx, strength FROM examples WHERE {chosen}"
        if "examples" in tables
        else f"""SELECT feature_id, row_number() OVER (PARTITION BY feature_id
                ORDER BY strength DESC, sequence_id, token_idx) AS rank,
            sequence_id, token_idx, strength FROM activations WHERE {chosen}"""
    )
    parts = [
        f"""SELECT feature_id, {TOP} AS number, rank, sequence_id, token_idx, strength,
            0.0 AS low, strength AS high, 0 AS count FROM ({top}) WHERE rank <= {n}"""
    ]
    if "intervals" in tables:
        parts.append(
            f"""SELECT feature_id, quantile, rank, sequence_id, token_idx, strength,
                low, high, count FROM intervals WHERE {chosen}"""
        )
    # A join by place, not by range: DuckDB then reads tokens once for all.
    rows = fetch(
        f"""
        WITH places AS ({" UNION ALL ".join(parts)}),
        spots AS (
            SELECT places.*, token_idx + shift AS spot
            FROM places, range(-{window}, {window} + 1) shifts(shift)),
        active AS (SELECT feature_id, sequence_id, token_idx, strength FROM activations
            WHERE {chosen})
        SELECT s.feature_id, s.number, s.low, s.high, s.count, s.sequence_id, s.token_idx,
            list(s.spot ORDER BY s.spot), list(t.token ORDER BY s.spot),
            list(t.decoded_token ORDER BY s.spot), list(coalesce(a.strength, 0) ORDER BY s.spot)
        FROM spots s
        JOIN tokens t ON t.sequence_id = s.sequence_id AND t.token_idx = s.spot
        LEFT JOIN active a ON a.feature_id = s.feature_id AND a.sequence_id = s.sequence_id
            AND a.token_idx = s.spot
        GROUP BY s.feature_id, s.number, s.rank, s.low, s.high, s.count, s.sequence_id,
            s.token_idx, s.strength
        ORDER BY s.feature_id, s.number, s.rank"""
    )
    counts: dict[int, int] = dict(
        fetch(f"SELECT feature_id, count(*) FROM activations WHERE {chosen} GROUP BY ALL")
    )
    found: dict[int, list[Context]] = {}
    for feature, number, low, high, count, sequence, place, spots, ids, texts, strengths in rows:
        found.setdefault(feature, []).append(
            Context(
                number,
                low,
                high,
                count / counts[feature],
                sequence,
                place,
                spots.index(place),
                tuple(ids),
                tuple(
                    f"[{token}]" if text is None else harmless(text)
                    for token, text in zip(ids, texts, strict=True)
                ),
                tuple(strengths),
            )
        )
    return found


def _grouped(rows: list[tuple[Any, ...]]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for feature, *rest in rows:
        found.setdefault(feature, []).append(tuple(rest))
    return found
