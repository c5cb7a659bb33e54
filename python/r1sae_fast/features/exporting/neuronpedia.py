"""Neuronpedia's files for import in bulk: what they are about, features, examples, explanations.

    release.jsonl model.jsonl sourceset.jsonl source.jsonl
    features/batch-N.jsonl.gz activations/batch-N.jsonl.gz explanations/batch-N.jsonl.gz

The rows are those of Neuronpedia's tables. Format: neuronpedia-utils' db_models, and
sae_dashboard/neuronpedia/neuronpedia_export.py of SAEDashboard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from r1sae_fast.features.exporting import saedashboard
from r1sae_fast.features.exporting.pages import Page
from r1sae_fast.features.exporting.target import Target

_COPIED = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)


def about(target: Target) -> dict[str, dict[str, Any]]:
    """The four files of one row."""
    who = {"creatorId": target.creator, "createdAt": target.created}
    name = f"{target.model_id} {target.source_set}"
    return {
        "release.jsonl": {
            **who,
            "name": target.source_set,
            "description": name,
            "descriptionShort": name,
            "creatorName": target.creator,
            "creatorNameShort": target.creator,
            "urls": [],
            "visibility": "PUBLIC",
        },
        "model.jsonl": {
            **who,
            "id": target.model_id,
            "instruct": True,
            "displayName": target.model_id,
            "displayNameShort": target.model_id,
            "visibility": "PUBLIC",
            "layers": 0,
            "neuronsPerLayer": 0,
            "inferenceEnabled": False,
            "owner": "",
            "updatedAt": target.created,
        },
        "sourceset.jsonl": {
            **who,
            "modelId": target.model_id,
            "name": target.source_set,
            "creatorName": target.creator,
            "description": name,
            "type": "",
            "urls": [],
            "releaseName": target.source_set,
            "hasDashboards": True,
            "visibility": "PUBLIC",
        },
        "source.jsonl": {
            **who,
            "id": target.source_id,
            "modelId": target.model_id,
            "setName": target.source_set,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "visibility": "PUBLIC",
            "num_prompts": target.sequences,
            "num_tokens_in_prompt": target.width,
        },
    }


def batch(pages: Sequence[Page], target: Target) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, of these features."""
    return {
        "features": [_feature(page, target) for page in pages],
        "activations": [
            _activation(page, number, target)
            for page in pages
            for number in range(len(page.contexts))
        ],
        "explanations": [
            _explanation(page, number, target)
            for page in pages
            for number in range(len(page.labels))
        ],
    }


def _place(page: Page, target: Target) -> dict[str, Any]:
    return {
        "modelId": target.model_id,
        "layer": target.source_id,
        "index": str(page.feature_id),
        "creatorId": target.creator,
        "createdAt": target.created,
    }


def _feature(page: Page, target: Target) -> dict[str, Any]:
    shown = saedashboard.figures(page, target)
    return {
        **_place(page, target),
        "maxActApprox": float(page.row.get("max") or 0.0),
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "hookName": None,
        "topkCosSimIndices": [other for other, _ in page.neighbours],
        "topkCosSimValues": [cosine for _, cosine in page.neighbours],
        **{name: shown[name] for name in _COPIED},
        "sourceSetName": target.source_set,
    }


def _activation(page: Page, number: int, target: Target) -> dict[str, Any]:
    context = page.contexts[number]
    shown = saedashboard.activation(context, page)
    values = shown["values"]
    return {
        "id": _id("activation", page, number, target),
        **_place(page, target),
        "tokens": shown["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "binMin": shown["bin_min"],
        "binMax": shown["bin_max"],
        "binContains": shown["bin_contains"],
        "qualifyingTokenIndex": shown["qualifying_token_index"],
        "dataIndex": None,
        "dataSource": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
    }


def _explanation(page: Page, number: int, target: Target) -> dict[str, Any]:
    label, model, version = page.labels[number]
    place = _place(page, target)
    return {
        "id": _id("explanation", page, number, target),
        "modelId": place["modelId"],
        "layer": place["layer"],
        "index": place["index"],
        "description": label,
        "typeName": version,
        "explanationModelName": model,
        "authorId": target.creator,
        "createdAt": target.created,
    }


def _id(kind: str, page: Page, number: int, target: Target) -> str:
    """25 letters and digits that begin with c, as Neuronpedia's, but the same every time."""
    name = f"{kind}/{target.model_id}/{target.source_id}/{page.feature_id}/{number}"
    return "c" + hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
