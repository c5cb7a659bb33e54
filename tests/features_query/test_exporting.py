"""Exports say what the database says, in the fields that the others' loaders have, harmlessly."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.exporting import pages
from r1sae_fast.features.exporting.encoding import encoded

# Of sae_dashboard.neuronpedia.neuronpedia_dashboard 0.8.0: NeuronpediaDashboardFeature.to_dict().
DASHBOARD_FIELDS = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
    "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations",
    "vector",
}  # fmt: skip
# Fields without a default of neuronpedia-utils' Activation, Feature and Explanation.
REQUIRED = {
    "features": {"modelId", "layer", "index"},
    "activations": {
        "id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue",
        "values", "creatorId",
    },
    "explanations": {
        "id", "modelId", "layer", "index", "description", "typeName", "explanationModelName",
        "authorId",
    },
}  # fmt: skip


def strongest(database: FeatureDB, feature: int, n: int, window: int) -> list[Any]:
    """Tokens, strengths and the peak of each example, by the queries for one feature."""
    rows = database.sql(
        "SELECT sequence_id, token_idx FROM examples WHERE feature_id = ? ORDER BY rank LIMIT ?",
        [feature, n],
    ).to_pylist()
    found = []
    for row in rows:
        near = database.sql(
            "SELECT t.token_idx, decoded_token, coalesce(strength, 0) AS strength FROM tokens t "
            "LEFT JOIN activations a ON a.sequence_id = t.sequence_id AND "
            "a.token_idx = t.token_idx AND a.feature_id = ? WHERE t.sequence_id = ? "
            "AND abs(t.token_idx - ?) <= ? ORDER BY t.token_idx",
            [feature, row["sequence_id"], row["token_idx"], window],
        ).to_pylist()
        found.append(
            (
                [n["decoded_token"].replace("\x1b", "␛") for n in near],
                [round(n["strength"], 3) for n in near],
                [n["token_idx"] for n in near].index(row["token_idx"]),
            )
        )
    return found


def test_saedashboards_batches(database: FeatureDB, tmp_path: Path) -> None:
    files = database.export_pages(tmp_path / "out", "saedashboard", n=4, window=3, batch=5)
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json", "batch-2.json"]
    batches = [json.loads(file.read_text("ascii")) for file in files]
    assert {"model_id", "layer", "sae_set", "features"} <= batches[0].keys()
    features = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(12))
    for feature in features:
        assert feature.keys() == DASHBOARD_FIELDS
        top = [a for a in feature["activations"] if a["bin_contains"] == -1]
        assert [(a["tokens"], a["values"], a["qualifying_token_index"]) for a in top] == strongest(
            database, feature["feature_index"], 4, 3
        )
        summary = database.feature(feature["feature_index"])
        assert feature["frac_nonzero"] == summary.density
        assert sum(feature["freq_hist_data_bar_heights"]) == summary.count
        for activation in feature["activations"]:
            assert len(activation["tokens"]) == len(activation["values"]) <= 7


def test_neuronpedias_import(database: FeatureDB, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = database.export_pages(out, "neuronpedia", [1, 3, 4, 11], model_id="m", n=4)
    assert len(files) == 4 + 3
    for name in ("release", "model", "sourceset", "source"):
        assert len((out / f"{name}.jsonl").read_text().splitlines()) == 1
    rows = {
        kind: [
            json.loads(line)
            for line in gzip.decompress((out / kind / "batch-0.jsonl.gz").read_bytes()).splitlines()
        ]
        for kind in REQUIRED
    }
    for kind, needed in REQUIRED.items():
        assert all(needed <= row.keys() for row in rows[kind]), kind
    assert [row["index"] for row in rows["features"]] == ["1", "3", "4", "11"]
    source = json.loads((out / "source.jsonl").read_text())
    assert {row["layer"] for kind in rows.values() for row in kind} == {source["id"]}
    assert {row["modelId"] for kind in rows.values() for row in kind} == {"m"}
    for row in rows["activations"]:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
    ids = [row["id"] for kind in ("activations", "explanations") for row in rows[kind]]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 25 for i in ids)
    models = {(r["explanationModelName"], r["description"]) for r in rows["explanations"]}
    assert ("judge-b", "proof") in models
    again = database.export_pages(
        tmp_path / "again", "neuronpedia", [1, 3, 4, 11], model_id="m", n=4
    )
    assert [a.read_bytes() for a in files] == [b.read_bytes() for b in again]


def test_json_lines(database: FeatureDB, tmp_path: Path) -> None:
    (file,) = database.export_pages(tmp_path / "out", "jsonl", n=2, window=1)
    rows = [json.loads(line) for line in file.read_text("ascii").splitlines()]
    assert [row["feature_id"] for row in rows] == list(range(12))
    assert {label["model_name"] for label in rows[3]["labels"]} >= {"judge-a", "judge-b"}
    assert rows[11]["contexts"] == []  # dead
    assert rows[1]["count"] == database.feature(1).count


@pytest.mark.parametrize("kind", ["jsonl", "neuronpedia", "saedashboard"])
def test_nothing_in_an_export_can_act(kind: Any, database: FeatureDB, tmp_path: Path) -> None:
    found = b""
    for file in database.export_pages(tmp_path / "out", kind, [1, 4]):
        data = file.read_bytes()
        found += gzip.decompress(data) if file.suffix == ".gz" else data
    assert found.isascii()
    assert not set(found) & {*range(0x00, 0x0A), *range(0x0B, 0x20), 0x7F}
    assert b"<" not in found  # no </script>, wherever it is pasted
    assert b"\\u001b" not in found
    if kind != "saedashboard":  # which has no labels
        assert b"\\u241b[2Jclear \\u003cscript\\u003e" in found


def test_wide_windows_are_read_of_fewer_features_at_a_time(
    database: FeatureDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    read = pages._read

    def counted(*given: Any) -> Any:
        asked.append(given[3])
        found = read(*given)
        cells = sum(len(page.contexts) for page in found) * (2 * given[5] + 1)
        assert cells <= pages._CELLS or len(found) == 1
        return found

    monkeypatch.setattr(pages, "_read", counted)
    # Of each feature up to 2 and the samples of five intervals of five.
    per_feature = database.sql(
        "SELECT max(n) FROM (SELECT count(*) AS n FROM intervals GROUP BY feature_id)"
    )[0][0].as_py()
    cells = (2 + per_feature) * (2 * 3 + 1)
    written = []
    # All at once; more than a file has; fewer than a file has; one, though it has no room.
    for room, sizes in ((99, [12]), (7, [5, 5, 2]), (4, [4, 1, 4, 1, 2]), (0.5, [1] * 12)):
        monkeypatch.setattr(pages, "_CELLS", int(room * cells))
        files = database.export_pages(tmp_path / str(room), "jsonl", n=2, window=3, batch=5)
        written.append([file.read_bytes() for file in files])
        assert [len(features) for features in asked] == sizes
        assert [feature for features in asked for feature in features] == list(range(12))
        asked.clear()
    assert all(files == written[0] for files in written)
    assert len(written[0]) == 3


def test_as_many_features_are_read_as_their_windows_allow() -> None:
    assert pages.features_at_once(45, 32) == 1024
    assert pages.features_at_once(75, 1000) == (16 << 20) // (75 * 2001)
    assert pages.features_at_once(75, 1 << 20) == 1
    assert pages.features_at_once(0, 0) == 1024


def test_numbers_that_are_none_become_null() -> None:
    assert encoded({"a": [float("nan"), float("inf"), 1.5]}) == b'{"a": [null, null, 1.5]}'


def test_what_is_there_stays(database: FeatureDB, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="holds files already"):
        database.export_pages(tmp_path, "jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    for features, problem in (([12], "no feature 12"), ([-1], "no feature -1")):
        with pytest.raises(ValueError, match=problem):
            database.export_pages(tmp_path / "new", "jsonl", features)
    assert not (tmp_path / "new").exists()


def test_the_command_exports(database: FeatureDB, tmp_path: Path) -> None:
    arguments = ["features", "export", str(database.path), str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--to", "saedashboard", "--features", "1,4"])
    assert result.exit_code == 0, result.output
    batch = json.loads((tmp_path / "out" / "batch-0.json").read_text())
    assert [feature["feature_index"] for feature in batch["features"]] == [1, 4]
    wrong = CliRunner().invoke(app, [*arguments, "--to", "jsonl", "--features", "a", "--overwrite"])
    assert wrong.exit_code == 1
    assert "expected ids by commas" in wrong.output
