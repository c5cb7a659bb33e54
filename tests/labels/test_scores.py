"""Whole runs against the server: labels and scores as they should come out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1sae_fast.features import FeatureDB
from r1sae_fast.labels import Endpoint, LabelSettings, label_features

Server = Any  # conftest's
Behave = Callable[..., Any]
WORDED = range(5)
OTHERS = (12, 13)  # active once, and never


def test_a_model_that_knows(
    server: Server, endpoint: Endpoint, knowing: Behave, database: Path
) -> None:
    server.behave = knowing
    run = label_features(database, endpoint, features=[*WORDED, *OTHERS], jobs=8)
    assert run.stopped is None
    assert run.unmerged is None
    assert run.failed == {}
    assert set(run.skipped) == set(OTHERS)
    assert "active in 1 windows" in run.skipped[12]
    assert run.labelled == len(WORDED)
    with FeatureDB(database) as db:
        for feature in WORDED:
            label, counted = db.labels(feature)
            assert label.label == f"feature {feature}"
            assert (label.model_name, label.prompt_version) == ("a-model", "r1sae-label-1")
            assert counted.statistical
            assert {s.scorer: s.balanced_accuracy for s in label.scores} == {
                "detection": 1.0,
                "fuzzing": 1.0,
            }
            for score in label.scores:
                assert score.true_positives == 50
                assert 20 <= score.true_negatives <= 50
                assert score.f1 == 1.0
                assert score.unanswered == 0
                assert score.margin is not None
                assert 0 < score.margin < 0.06
        assert [label.statistical for label in db.labels(13)] == [True]
        assert db.labeller is not None
        assert (db.labeller.model_name, db.labeller.score) == ("a-model", 1.0)
    assert [path.name for path in database.parent.iterdir()] == ["features.ddb"]


def test_a_model_that_guesses(
    server: Server, endpoint: Endpoint, guessing: Behave, database: Path
) -> None:
    server.behave = guessing
    label_features(database, endpoint, features=WORDED, jobs=8)
    with FeatureDB(database) as db:
        rows = db.sql("SELECT * FROM scores").to_pylist()
    assert len(rows) == 2 * len(WORDED)
    for scorer in ("detection", "fuzzing"):
        rates = []
        for right, wrong in (
            ("true_positives", "false_negatives"),
            ("true_negatives", "false_positives"),
        ):
            these = sum(row[right] for row in rows if row["scorer"] == scorer)
            all_ = these + sum(row[wrong] for row in rows if row["scorer"] == scorer)
            rates.append((these / all_, all_))
        # A passage shows up under several features, with the same coin each time: of the tosses
        # some repeat. At least a third are distinct; six standard deviations of the binomial.
        balanced = (rates[0][0] + rates[1][0]) / 2
        deviation = math.sqrt(sum(0.25 / (n / 3) for _, n in rates)) / 2
        assert abs(balanced - 0.5) < 6 * deviation < 0.25
    for row in rows:
        n = row["true_positives"] + row["false_negatives"]
        m = row["true_negatives"] + row["false_positives"]
        expected = (row["true_positives"] / n + row["true_negatives"] / m) / 2
        assert row["balanced_accuracy"] == pytest.approx(expected)
        precision = row["true_positives"] / (row["true_positives"] + row["false_positives"])
        recall = row["true_positives"] / n
        assert row["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert (row["precision"], row["recall"]) == pytest.approx((precision, recall))


def test_several_labellers_stand_side_by_side(
    server: Server, endpoint: Endpoint, knowing: Behave, guessing: Behave, database: Path
) -> None:
    settings = LabelSettings(explain=20, test=10, negatives=10)
    server.behave = knowing
    label_features(database, endpoint, settings, [1, 2])
    server.behave = guessing
    other = Endpoint(endpoint.url, "another", scorer_model="judge")
    label_features(database, other, settings, [1, 2, 3])
    server.behave = knowing
    label_features(database, endpoint, LabelSettings(scorers=()), [1])
    with FeatureDB(database) as db:
        version = settings.prompt_version
        assert version.startswith("r1sae-label-1+")
        assert version != LabelSettings(scorers=()).prompt_version
        names = [(x.model_name, x.labels) for x in db.labellers]
        assert names == [("a-model", 2), ("another", 3), ("a-model", 1), ("statistics", 14)]
        assert [x.model_name for x in db.labels(1)] == [
            "a-model",
            "another",
            "a-model",
            "statistics",
        ]
        assert {s.judge for s in db.labels(1)[1].scores} == {"judge"}
        db.labeller = "another"
        assert db.labels(1)[0].model_name == "another"
        assert db.labels(1)[-1].statistical
        db.labeller = f"a-model@{version}"
        assert db.labels(3)[0].model_name == "another"
        db.labeller = "statistics"
        assert db.labels(2)[0].statistical
        with pytest.raises(ValueError, match=r"no labeller 'nobody'.* a-model@"):
            db.labeller = "nobody"
