"""Everything that is shown of one feature, gathered in few short reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from r1sae_fast.features.contexts import Fetch, contexts
from r1sae_fast.features.labelled import Columns, Who
from r1sae_fast.features.query.columns import best_labels
from r1sae_fast.features.results import TopExample

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from r1sae_fast.features.summary import FeatureSummary

_INTERVALS = 5


@dataclass(frozen=True)
class Interval:
    """Examples from one part of a feature's strengths, ``low`` to ``high``; number 0: the weakest.

    ``count``: the activations in it.
    """

    number: int
    low: float
    high: float
    count: int
    examples: tuple[TopExample, ...]


@dataclass(frozen=True)
class Related:
    """Another feature: ``value`` is the cosine of the decoder directions, or the PMI in bits."""

    feature_id: int
    value: float
    label: str | None
    model_name: str | None


@dataclass(frozen=True)
class FeatureToken:
    """A token that a feature fires on, or beside (``offset`` -1: after it, 1: before it)."""

    text: str | None
    token: int
    offset: int
    share: float
    lift: float


@dataclass(frozen=True)
class FeatureView:
    """A feature, to be looked at: ``rich.print(view)`` in a terminal, by itself in a notebook.

    ``edges``: of the histogram's bins. What the file has no table for is empty.
    """

    summary: FeatureSummary
    examples: tuple[TopExample, ...]
    intervals: tuple[Interval, ...]
    tokens: tuple[FeatureToken, ...]
    neighbours: tuple[Related, ...]
    coactivations: tuple[Related, ...]
    edges: tuple[float, ...] | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from r1sae_fast.features.show import feature_panel

        plain = console.color_system is None or console.no_color
        yield feature_panel(self, marks=plain)

    def _repr_html_(self) -> str:
        from r1sae_fast.features.page.feature import feature_html

        return feature_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        entries = asdict(self)
        entries["summary"]["segment_density"] = dict(self.summary.segment_density)
        return entries


def gather(
    fetch: Fetch,
    tables: Columns,
    summary: FeatureSummary,
    examples: Sequence[TopExample],
    edges: tuple[float, ...] | None,
    window: int,
    per_interval: int,
    chosen: Who | None,
    related: int = 5,
) -> FeatureView:
    """The view of a feature whose summary and strongest examples are known."""
    feature = summary.feature_id
    return FeatureView(
        summary,
        tuple(examples),
        _intervals(fetch, tables, feature, window, per_interval) if summary.count else (),
        _tokens(fetch, tables, feature),
        _related(fetch, tables, "neighbours", "cosine", feature, related, chosen),
        _related(fetch, tables, "coactivations", "pmi", feature, related, chosen),
        edges,
    )


def _intervals(
    fetch: Fetch, tables: Columns, feature: int, window: int, each: int
) -> tuple[Interval, ...]:
    """Those that were sampled; of a file without them equal parts of the activations in the order
    of strength, and places spread evenly over each."""
    rows = []
    if "intervals" in tables:
        rows = fetch(
            "SELECT quantile, low, high, count, sequence_id, token_idx, strength FROM intervals "
            f"WHERE feature_id = ? AND rank <= {each} AND isfinite(low + high + strength) "
            "AND quantile + count + sequence_id + token_idx IS NOT NULL "
            "ORDER BY quantile, strength DESC",
            [feature],
        )
    if not rows:
        rows = fetch(
            f"""WITH cut AS (
                    SELECT *, ntile({_INTERVALS}) OVER
                        (ORDER BY strength, sequence_id, token_idx) - 1 AS number
                    FROM activations WHERE feature_id = ? AND isfinite(strength)),
                placed AS (
                    SELECT *, min(strength) OVER w AS low, max(strength) OVER w AS high,
                        count(*) OVER w AS count, row_number() OVER (PARTITION BY number
                            ORDER BY strength, sequence_id, token_idx) - 1 AS place
                    FROM cut WINDOW w AS (PARTITION BY number))
                SELECT number, low, high, count, sequence_id, token_idx, strength FROM placed
                WHERE {each} > 0
                    AND (place = 0 OR place * {each} // count > (place - 1) * {each} // count)
                ORDER BY number, strength DESC""",
            [feature],
        )
    places = list(dict.fromkeys((row[4], row[5]) for row in rows))
    around = contexts(fetch, feature, places, window, with_segment="segment" in tables["tokens"])
    found: dict[int, list[tuple[Any, ...]]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(row)
    return tuple(
        Interval(
            number,
            group[0][1],
            group[0][2],
            group[0][3],
            tuple(
                TopExample(feature, rank, sequence, place, strength, around[sequence, place])
                for rank, (*_, sequence, place, strength) in enumerate(group, 1)
            ),
        )
        for number, group in found.items()
    )


def _tokens(fetch: Fetch, tables: Columns, feature: int, n: int = 8) -> tuple[FeatureToken, ...]:
    if "token_lift" not in tables:
        return ()
    rows = fetch(
        "SELECT decoded_token, token, token_offset, share, lift FROM token_lift "
        "WHERE feature_id = ? AND token_offset = 0 AND lift > 1 AND isfinite(lift + share) "
        "AND token IS NOT NULL ORDER BY rank",
        [feature],
    )
    return tuple(FeatureToken(*row) for row in rows[:n])


def _related(
    fetch: Fetch, tables: Columns, table: str, column: str, feature: int, n: int, chosen: Who | None
) -> tuple[Related, ...]:
    if table not in tables:
        return ()
    rows = fetch(
        f"SELECT other_id, {column} FROM {table} WHERE feature_id = ? AND other_id IS NOT NULL "
        f"AND {column} IS NOT NULL ORDER BY rank LIMIT {n}",
        [feature],
    )
    labels = shown_labels(fetch, tables, [row[0] for row in rows], chosen)
    return tuple(Related(other, value, *labels.get(other, (None, None))) for other, value in rows)


def shown_labels(
    fetch: Fetch, tables: Columns, features: Sequence[int], who: Who | None
) -> Mapping[int, tuple[str, str | None]]:
    """The label to show for each of a few features, and who wrote it."""
    if not features:
        return {}
    chosen = ", ".join(str(int(feature)) for feature in features)
    rows = fetch(
        f"SELECT feature_id, label, model_name FROM ({best_labels(tables, who)}) "
        f"WHERE feature_id IN ({chosen})"
    )
    return {row[0]: (row[1], row[2]) for row in rows}
