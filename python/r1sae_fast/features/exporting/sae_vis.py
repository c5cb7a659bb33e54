"""What SAEDashboard's ``SaeVisData.save_json`` writes, for ``load_json`` and its own page.

Histogram and quantiles are computed as SAEDashboard does, from all strengths of a feature. Its
contexts name tokens by id alone, so whoever loads the file brings the tokenizer. Logits are there
if :class:`~.logits.Logits` are given; tables of neurons and of correlations are empty. Format:
sae-dashboard 0.8, sae_dashboard/sae_vis_data.py, feature_data.py, components.py, utils_fns.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from r1sae_fast.features.exporting.logits import BINS, ROWS, Logits
from r1sae_fast.features.exporting.pages import Page
from r1sae_fast.features.exporting.windows import TOP, Context

_TABLES = (
    *(f"neuron_alignment_{name}" for name in ("indices", "values", "l1")),
    *(
        f"correlated_{kind}_{name}"
        for kind in ("neurons", "features", "b_features")
        for name in ("indices", "pearson", "cossim")
    ),
)
_RANGES: list[tuple[list[float], int]] = [
    ([0.0, 0.95], 3),
    ([0.95, 0.99], 4),
    ([0.99, 1.0], 5),
]
"""Quantiles from, to, in steps of 10 to the minus so much."""
_NOTHING = 1e-6  # what is less counts as inactive there


@dataclass(frozen=True)
class Activity:
    """Where the numbers of a feature come from that its page does not have.

    ``query`` gives a query's rows; ``tokens``: of the database.
    """

    query: Callable[[str], pa.Table]
    tokens: int
    logits: Logits | None

    def strengths(self, features: Sequence[int]) -> list[NDArray[np.float64]]:
        """All activations of each feature, in ascending order."""
        table = self.query(
            "SELECT feature_id, strength::DOUBLE AS strength FROM activations "
            f"WHERE feature_id IN ({', '.join(map(str, features))}) AND isfinite(strength) "
            "ORDER BY ALL"
        )
        ids, values = (table[name].to_numpy() for name in ("feature_id", "strength"))
        starts = np.searchsorted(ids, features)
        ends = np.searchsorted(ids, features, side="right")
        return [values[start:end] for start, end in zip(starts, ends, strict=True)]


def vis_data(pages: Sequence[Page], activity: Activity) -> dict[str, Any]:
    """The file of these features. Those that are never active are left out: one of them would
    keep SAEDashboard's page from being drawn.
    """
    # Once each: the lists of figures are read beside the features' dict, which has each once.
    pages = list({page.feature_id: page for page in pages if page.contexts}.values())
    features = [page.feature_id for page in pages]
    strengths = [v if len(v) else np.zeros(1) for v in activity.strengths(features)]
    logits = [None] * len(pages) if activity.logits is None else activity.logits.of(features)
    return {
        "feature_data_dict": {
            str(page.feature_id): _feature(page, values, effect, activity.tokens)
            for page, values, effect in zip(pages, strengths, logits, strict=True)
        },
        "feature_stats": {
            "max": [float(values[-1]) for values in strengths],
            "frac_nonzero": [len(values) / activity.tokens for values in strengths],
            "skew": [],
            "kurtosis": [],
            "quantile_data": [quantiles(values, activity.tokens) for values in strengths],
            "quantiles": [round(q, 6) for q in [*_steps().tolist(), 1.0]],
            "ranges_and_precisions": _RANGES,
        },
    }


def quantiles(strengths: NDArray[np.float64], tokens: int) -> list[float]:
    """Quantiles of a feature's strengths on all tokens, without the zeros that come first."""
    zeros = tokens - len(strengths)
    at = _steps() * (tokens - 1)
    low = np.floor(at).astype(np.int64)

    def value(index: NDArray[np.int64]) -> NDArray[np.float64]:
        inside = np.clip(index - zeros, 0, len(strengths) - 1)
        return np.where(index < zeros, 0.0, strengths[inside])

    below, above = value(low), value(np.minimum(low + 1, tokens - 1))
    found = np.round(below + (above - below) * (at - low), 6)
    active = np.abs(found) > _NOTHING
    return list(found[int(active.argmax()) if active.any() else len(found) :].tolist())


def _steps() -> NDArray[np.float64]:
    parts = []
    for (start, end), precision in _RANGES:
        step = 10.0**-precision
        parts.append(start + step * np.arange(round((end - start) / step)))
    return np.concatenate(parts)


def _feature(
    page: Page,
    strengths: NDArray[np.float64],
    logits: NDArray[np.float32] | None,
    tokens: int,
) -> dict[str, Any]:
    title = f"ACTIVATIONS<br>DENSITY = {len(strengths) / tokens:.3%}"
    return {
        "feature_tables_data": {name: [] for name in _TABLES},
        "acts_histogram_data": {**histogram(strengths), "title": title},
        "logits_table_data": _logits_table(logits),
        "logits_histogram_data": {
            **histogram(np.empty(0) if logits is None else np.sort(logits.astype(np.float64))),
            "title": None,
        },
        "sequence_data": {"seq_group_data": _groups(page, strengths, logits, tokens)},
        "prompt_data": _sequence(0, 0, [], [], None),
        "dfa_data": {},
        "decoder_weights_data": None,
    }


def histogram(values: NDArray[np.float64]) -> dict[str, list[float]]:
    """50 bins of equal width over ascending values, as SAEDashboard draws them."""
    if not len(values):
        return {"bar_heights": [], "bar_values": [], "tick_vals": []}
    low, high = float(values[0]), float(values[-1])
    if low == high:
        return {
            "bar_heights": [float(len(values))],
            "bar_values": [low],
            "tick_vals": [0, round(low, 3)],
        }
    heights, edges = np.histogram(values, BINS, (low, high))
    step = max(abs(low), abs(high)) / 3
    ticks = [round(step * i, 2) for i in range(-3, 4) if low <= step * i <= high or i == 0]
    return {
        "bar_heights": heights.astype(float).tolist(),
        "bar_values": np.round((edges[:-1] + edges[1:]) / 2, 5).tolist(),
        "tick_vals": ticks,
    }


def _logits_table(logits: NDArray[np.float32] | None) -> dict[str, list[Any]]:
    if logits is None:
        return {"bottom_token_ids": [], "bottom_logits": [], "top_token_ids": [], "top_logits": []}
    order = np.argsort(logits, kind="stable")
    bottom, top = order[:ROWS], order[::-1][:ROWS]
    return {
        "bottom_token_ids": bottom.tolist(),
        "bottom_logits": logits[bottom].tolist(),
        "top_token_ids": top.tolist(),
        "top_logits": logits[top].tolist(),
    }


def _groups(
    page: Page,
    strengths: NDArray[np.float64],
    logits: NDArray[np.float32] | None,
    tokens: int,
) -> list[dict[str, Any]]:
    """The strongest examples, then the intervals from the strongest to the weakest."""
    groups = []
    by_interval = {n: list(found) for n, found in groupby(page.contexts, lambda c: c.interval)}
    for interval in (TOP, *sorted(by_interval.keys() - {TOP}, reverse=True)):
        found = by_interval.get(interval, [])
        title = f"TOP ACTIVATIONS<br>MAX = {strengths[-1]:.3f}"
        if interval != TOP:
            one = found[0]
            share = one.share * len(strengths) / tokens
            title = f"INTERVAL {one.low:.3f} - {one.high:.3f}<br>CONTAINS {share:.3%}"
        groups.append({"title": title, "seq_data": [_context(one, logits) for one in found]})
    return groups


def _context(context: Context, logits: NDArray[np.float32] | None) -> dict[str, Any]:
    strengths = [round(strength, 4) for strength in context.strengths]
    ids = [-1 if token is None else token for token in context.tokens]
    return _sequence(context.sequence_id, context.token_idx, ids, strengths, logits)


def _sequence(
    sequence: int,
    place: int,
    ids: list[int],
    strengths: list[float],
    logits: NDArray[np.float32] | None,
) -> dict[str, Any]:
    return {
        "original_index": sequence,
        "qualifying_token_index": place,
        "token_ids": ids,
        "feat_acts": strengths,
        "loss_contribution": [],
        # Drawn as a line in the histogram of logits, so there must be one of each token.
        "token_logits": [
            0.0 if logits is None or not 0 <= token < len(logits) else float(logits[token])
            for token in ids
        ],
        "top_token_ids": [],
        "top_logits": [],
        "bottom_token_ids": [],
        "bottom_logits": [],
    }
