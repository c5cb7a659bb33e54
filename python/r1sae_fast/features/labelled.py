"""Labels of a database with their scores, and who made them."""

from __future__ import annotations

from collections.abc import Mapping

from r1sae_fast.features.contexts import Fetch
from r1sae_fast.features.labels import MODEL_NAME
from r1sae_fast.features.summary import Label, Labeller, Score

Columns = Mapping[str, set[str]]

Who = tuple[str | None, str | None]
"""Model and prompt version."""


def labellers(fetch: Fetch, columns: Columns) -> tuple[Labeller, ...]:
    """All who labelled, the best first: by score, then by number of labels, counting last."""
    if "autointerp" not in columns:
        return ()
    scored = (
        """
        LEFT JOIN (
            SELECT model_name, prompt_version, avg(score) AS score FROM (
                SELECT feature_id, model_name, prompt_version, avg(balanced_accuracy) AS score
                FROM scores GROUP BY ALL
            ) GROUP BY ALL
        ) s ON s.model_name IS NOT DISTINCT FROM a.model_name
           AND s.prompt_version IS NOT DISTINCT FROM a.prompt_version"""
        if "scores" in columns
        else "LEFT JOIN (SELECT NULL::DOUBLE AS score) s ON false"
    )
    found = fetch(
        f"""
        SELECT a.model_name, a.prompt_version, a.labels, s.score FROM (
            SELECT model_name, prompt_version, count(DISTINCT feature_id) AS labels
            FROM autointerp WHERE label IS NOT NULL GROUP BY ALL
        ) a {scored}
        ORDER BY a.model_name IS NOT DISTINCT FROM '{MODEL_NAME}', s.score DESC NULLS LAST,
                 a.labels DESC, a.model_name, a.prompt_version"""
    )
    return tuple(Labeller(*row) for row in found)


def labels_of(
    fetch: Fetch, columns: Columns, feature: int, chosen: Who | None
) -> tuple[Label, ...]:
    """A feature's labels: the chosen labeller's, then the best scored, the counted one last."""
    if "autointerp" not in columns:
        return ()
    scores: dict[Who, list[Score]] = {}
    if "scores" in columns:
        for model, version, *score in fetch(
            "SELECT model_name, prompt_version, scorer, judge, true_positives, "
            "false_negatives, true_negatives, false_positives, unanswered FROM scores "
            "WHERE feature_id = ? AND true_positives + false_negatives + true_negatives + "
            "false_positives + unanswered IS NOT NULL ORDER BY scorer",
            [feature],
        ):
            scores.setdefault((model, version), []).append(Score(*score))
    rows = fetch(
        "SELECT label, quality, interestingness, model_name, prompt_version FROM autointerp "
        "WHERE feature_id = ? AND label IS NOT NULL "
        "ORDER BY model_name, prompt_version, label",
        [feature],
    )
    labels = [
        Label(
            label,
            quality,
            interestingness,
            model,
            version,
            tuple(scores.get((model, version), ())),
        )
        for label, quality, interestingness, model, version in rows
    ]
    return tuple(sorted(labels, key=lambda label: _order(label, chosen)))


def _order(label: Label, chosen: Who | None) -> tuple[bool, bool, float]:
    score = label.score
    return (
        (label.model_name, label.prompt_version) != chosen,
        label.statistical,
        1.0 if score is None else -score,
    )


def choose(found: tuple[Labeller, ...], wanted: str) -> Labeller:
    """The labeller called ``wanted``: a model's name, or ``name@prompt version``.

    Raises:
        ValueError: there is none.
    """
    for labeller in found:
        if wanted in (labeller.model_name, f"{labeller.model_name}@{labeller.prompt_version}"):
            return labeller
    names = ", ".join(f"{x.model_name}@{x.prompt_version}" for x in found) or "none"
    raise ValueError(f"no labeller {wanted!r} in this database; it has {names}")
