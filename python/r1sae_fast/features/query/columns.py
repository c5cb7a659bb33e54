"""One row a feature: everything that features can be chosen and sorted by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from r1sae_fast.features.labelled import Columns, Who
from r1sae_fast.features.labels import MODEL_NAME
from r1sae_fast.features.query.expression import Expression, column_name, no_such_column
from r1sae_fast.features.query.frame import Frame

SHOWN = ("feature_id", "count", "density", "mean", "max", "label", "model_name")
"""The columns that are given where none are named; those that sort or choose come after them."""

_LISTS = ("histogram", "position_counts")  # no single value


def best_labels(tables: Columns, chosen: Who | None) -> str:
    """SQL for one label a feature: (feature_id, label, model_name, detection, fuzzing).

    The chosen labeller's, else a model's before the counted one; of several the one that scored
    best. detection and fuzzing are its balanced accuracies, means over judges.
    """
    if "autointerp" not in tables:
        return (
            "SELECT NULL::INTEGER AS feature_id, NULL::VARCHAR AS label, NULL::VARCHAR AS "
            "model_name, NULL::DOUBLE AS detection, NULL::DOUBLE AS fuzzing WHERE false"
        )
    scored = (
        """SELECT feature_id, model_name, prompt_version,
               avg(balanced_accuracy) AS score,
               avg(balanced_accuracy) FILTER (scorer = 'detection') AS detection,
               avg(balanced_accuracy) FILTER (scorer = 'fuzzing') AS fuzzing
           FROM scores GROUP BY ALL"""
        if "scores" in tables
        else """SELECT NULL::INTEGER AS feature_id, NULL::VARCHAR AS model_name,
               NULL::VARCHAR AS prompt_version, NULL::DOUBLE AS score, NULL::DOUBLE AS detection,
               NULL::DOUBLE AS fuzzing WHERE false"""
    )
    return f"""
        SELECT a.feature_id, a.label, a.model_name, s.detection, s.fuzzing
        FROM autointerp a LEFT JOIN ({scored}) s
            ON s.feature_id = a.feature_id AND s.model_name IS NOT DISTINCT FROM a.model_name
            AND s.prompt_version IS NOT DISTINCT FROM a.prompt_version
        WHERE a.label IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY a.feature_id ORDER BY{_chosen_first(chosen)}
            a.model_name IS NOT DISTINCT FROM '{MODEL_NAME}', s.score DESC NULLS LAST,
            a.model_name, a.prompt_version, a.label) = 1"""


def _chosen_first(chosen: Who | None) -> str:
    if chosen is None:
        return ""
    model, version = map(_literal, chosen)
    return (
        f" (a.model_name IS NOT DISTINCT FROM {model}"
        f" AND a.prompt_version IS NOT DISTINCT FROM {version}) DESC,"
    )


def _literal(text: str | None) -> str:
    if text is None:
        return "NULL"
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


def statistics_query(tables: Columns, chosen: Who | None) -> str:
    """SQL for the table of all features, sorted by id; released files are counted for it."""
    if "features" in tables:
        names = ", ".join(f"f.{n}" for n in sorted(tables["features"]) if n not in _LISTS)
        features = f"SELECT {names} FROM features f"
    else:
        features = """
            SELECT feature_id, count(*) AS count,
                   count(*) / (SELECT count(*) FROM tokens) AS density,
                   avg(strength) AS mean, max(strength) AS max
            FROM activations GROUP BY feature_id"""
    extra, joins = "", ""
    if "token_lift" in tables:
        extra += ", t.decoded_token AS top_token, t.lift AS top_token_lift"
        joins += """ LEFT JOIN token_lift t ON t.feature_id = f.feature_id
            AND t.token_offset = 0 AND t.rank = 1"""
    if "neighbours" in tables:
        extra += ", n.other_id AS nearest, n.cosine AS nearest_cosine"
        joins += " LEFT JOIN neighbours n ON n.feature_id = f.feature_id AND n.rank = 1"
    return f"""
        SELECT f.*, l.label, l.model_name, l.detection, l.fuzzing{extra}
        FROM ({features}) f
        LEFT JOIN ({best_labels(tables, chosen)}) l ON l.feature_id = f.feature_id{joins}
        ORDER BY f.feature_id"""


def find(
    table: pa.Table,
    where: str | None,
    sort: str | Sequence[str],
    n: int | None,
    columns: Sequence[str] | None,
    shown: Sequence[str] = SHOWN,
) -> Frame:
    """Chooses rows of ``table``; see :meth:`FeatureDB.find`."""
    if n is not None and n < 0:
        raise ValueError(f"n is {n}; expected at least 0, or None for all")
    names = list(table.column_names)
    rows = np.arange(table.num_rows)
    named: list[str] = []
    if where is not None:
        condition = Expression(where)
        rows = rows[condition.mask(table)]
        named += [column_name(name, names) or name for name in sorted(condition.names)]
    keys = [sort] if isinstance(sort, str) else list(sort)
    keys = [key.strip() for part in keys for key in part.split(",") if key.strip()]
    # The last key first: every sort is stable, so earlier keys rule.
    for key in reversed(keys):
        name = _named(key.lstrip("-+"), names)
        rows = rows[_order(table.column(name).take(pa.array(rows)), key.startswith("-"))]
    named += [_named(key.lstrip("-+"), names) for key in keys]
    chosen = (
        [_named(name, names) for name in columns]
        if columns is not None
        else [name for name in shown if name in names]
    )
    if columns is None:
        at = chosen.index("label") if "label" in chosen else len(chosen)
        chosen[at:at] = [name for name in dict.fromkeys(named) if name not in chosen]
    return Frame(table.select(list(dict.fromkeys(chosen))).take(pa.array(rows[:n])))


def _named(name: str, names: list[str]) -> str:
    found = column_name(name, names)
    if found is None:
        raise no_such_column(name, names)
    return found


def _order(column: pa.ChunkedArray, falling: bool) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """A stable order; what is unknown comes last either way."""
    if pa.types.is_floating(column.type):
        values = column.to_numpy().astype(np.float64)
        known = ~np.isnan(values)
        keys = -values if falling else values
    elif pa.types.is_integer(column.type):
        known = column.is_valid().to_numpy()
        keys = column.fill_null(0).to_numpy().astype(np.int64)
        keys = -keys if falling else keys
    else:
        known = column.is_valid().to_numpy()
        texts = column.cast(pa.string()).fill_null("")
        # Ranks, so that falling is the negative of rising and equal ones keep their order.
        _, ranks = np.unique(np.asarray(texts.to_pylist(), dtype=object), return_inverse=True)
        keys = -ranks if falling else ranks
    return np.lexsort((keys, ~known))
