"""What SAEDashboard's NeuronpediaRunner writes: ``batch-N.json``, a NeuronpediaDashboardBatch each.

What takes a pass over pairs of neurons (correlations) is empty, and without a model what takes its
unembedding too (logits; ``write.add_logits`` fills them in), as they are there for features that
were not looked at. Format: sae-dashboard 0.8, sae_dashboard/neuronpedia/neuronpedia_dashboard.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from r1sae_fast import _core
from r1sae_fast.features.exporting.encoding import encoded
from r1sae_fast.features.exporting.pages import Page
from r1sae_fast.features.exporting.target import Target
from r1sae_fast.features.exporting.windows import TOP, Context

_EMPTY = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)


def batch(rows: Sequence[dict[str, Any]], pages: Sequence[Page], target: Target) -> bytes:
    """The batch of these features, as JSON; ``rows``: their :func:`figures`."""
    about = {
        "model_id": target.model_id,
        "layer": target.layer,
        "sae_set": target.source_set,
        "sae_id_suffix": None,
    }
    lists = activations(pages)
    features = (_with(row, "activations", found) for row, found in zip(rows, lists, strict=True))
    return _with(about, "features", b", ".join(features))


def _with(entries: dict[str, Any], name: str, listed: bytes) -> bytes:
    """JSON of the entries, with a list of what is JSON already as their last."""
    return encoded(entries)[:-1] + f', "{name}": ['.encode() + listed + b"]}"


def activations(pages: Sequence[Page]) -> list[bytes]:
    """Of each page the entries of the list ``activations``."""
    found: list[bytes] = []
    for windows, together in groupby(pages, key=lambda page: page.contexts.windows):
        here = list(together)
        bins = windows.bins.copy()
        for page in here:
            part = slice(page.contexts.start, page.contexts.end)
            top = windows.interval[part] == TOP
            bins[part][top] = -1.0, float(page.row.get("max") or 0.0), -1.0
        found += _core.contexts_json(
            windows.codes,
            windows.strengths,
            bins,
            windows.codes_json,
            [(page.contexts.start, page.contexts.end) for page in here],
        )
    return found


def figures(page: Page, target: Target) -> dict[str, Any]:
    """One feature, as in SAEDashboard's batch, without its activations."""
    heights, values = histogram(page, target)
    return {
        "feature_index": page.feature_id,
        **{name: [] for name in _EMPTY},
        "frac_nonzero": page.row.get("density") or 0.0,
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": values,
        "n_prompts_total": target.sequences,
        "n_tokens_in_prompt": target.width,
        "dataset": "",
    }


def histogram(page: Page, target: Target) -> tuple[list[float], list[float]]:
    """Heights, and the middles of the bins, of the part that holds anything."""
    edges = target.edges or ()
    if page.histogram is None or len(edges) != len(page.histogram) + 1:
        return [], []
    filled = [i for i, count in enumerate(page.histogram) if count]
    if not filled:
        return [], []
    shown = range(filled[0], filled[-1] + 1)
    return (
        [float(page.histogram[i]) for i in shown],
        [round((edges[i] + edges[i + 1]) / 2, 6) for i in shown],
    )


def activation(context: Context, page: Page) -> dict[str, Any]:
    """One example. The strongest ones have -1 for their interval's least strength and share."""
    top = context.interval == TOP
    return {
        "bin_min": -1.0 if top else context.low,
        "bin_max": float(page.row.get("max") or 0.0) if top else context.high,
        "bin_contains": -1.0 if top else context.share,
        "qualifying_token_index": context.peak,
        "tokens": list(context.texts),
        "values": [round(strength, 3) for strength in context.strengths],
    }
