"""Many features' pages of data, many features at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from r1sae_fast.features.contexts import Fetch
from r1sae_fast.features.exporting.windows import Contexts, Table, contexts_of
from r1sae_fast.features.labelled import Columns, Who
from r1sae_fast.features.query.columns import statistics_query
from r1sae_fast.features.text import harmless

_READ = 1024
"""Features that are read at a time: a query takes about as long for fewer."""
_CELLS = 16 << 20  # tokens around their examples: read at a time, they take some 100 bytes each


@dataclass(frozen=True)
class Page:
    """What is exported of a feature; ``row``: its columns of :attr:`FeatureDB.statistics`."""

    feature_id: int
    row: dict[str, Any]
    histogram: tuple[int, ...] | None
    labels: tuple[tuple[str, str | None, str | None], ...]
    neighbours: tuple[tuple[int, float], ...]
    contexts: Contexts


def pages(
    fetch: Fetch,
    table: Table,
    tables: Columns,
    features: Sequence[int],
    *,
    n: int,
    window: int,
    who: Who | None,
    batch: int,
) -> Iterator[list[Page]]:
    """The pages of ``features``, so many at a time, in their order.

    ``fetch`` gives a query's rows, ``table`` an Arrow table of them.
    """
    most = features_at_once(_examples(fetch, tables, n), window)
    size = max(1, most // batch) * batch
    for start in range(0, len(features), size):
        some = list(features[start : start + size])
        found: list[Page] = []
        for first in range(0, len(some), most):
            found += _read(fetch, table, tables, some[first : first + most], n, window, who)
        for first in range(0, len(found), batch):
            yield found[first : first + batch]


def features_at_once(examples: int, window: int) -> int:
    """How many features are read at a time where each has at most so many examples."""
    return min(_READ, max(1, _CELLS // max(1, examples * (2 * window + 1))))


def _examples(fetch: Fetch, tables: Columns, n: int) -> int:
    """At most so many has a feature in all: of the ``n`` strongest, and of the intervals."""

    def largest(table: str) -> int:
        query = f"SELECT max(n) FROM (SELECT count(*) AS n FROM {table} GROUP BY feature_id)"
        return fetch(query)[0][0] or 0

    top = min(n, largest("examples")) if "examples" in tables else n
    return top + (largest("intervals") if "intervals" in tables else 0)


def _read(
    fetch: Fetch,
    table: Table,
    tables: Columns,
    features: list[int],
    n: int,
    window: int,
    who: Who | None,
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
            f"WHERE {chosen} AND label IS NOT NULL ORDER BY ALL"
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
    contexts = contexts_of(table, tables, features, n, window)
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
            contexts[number],
        )
        for number, feature in enumerate(features)
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


def _grouped(rows: list[tuple[Any, ...]]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for feature, *rest in rows:
        found.setdefault(feature, []).append(tuple(rest))
    return found
