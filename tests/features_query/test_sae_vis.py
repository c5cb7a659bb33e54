"""The file of SAEDashboard's SaeVisData: its structure, its numbers, and its own classes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from r1sae_fast import FastSAE, tiny_r1
from r1sae_fast.cli.main import app
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB

# Of sae-dashboard 0.8.0: sae_vis_data._SaeVisData.to_dict(), and what is in it.
FIELDS = {
    "feature_tables_data": {
        "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_cossim",
        "correlated_features_indices", "correlated_features_pearson",
        "correlated_features_cossim", "correlated_b_features_indices",
        "correlated_b_features_pearson", "correlated_b_features_cossim",
    },
    "acts_histogram_data": {"bar_heights", "bar_values", "tick_vals", "title"},
    "logits_table_data": {"bottom_token_ids", "bottom_logits", "top_token_ids", "top_logits"},
    "logits_histogram_data": {"bar_heights", "bar_values", "tick_vals", "title"},
    "sequence_data": {"seq_group_data"},
    "prompt_data": {
        "original_index", "qualifying_token_index", "token_ids", "feat_acts", "loss_contribution",
        "token_logits", "top_token_ids", "top_logits", "bottom_token_ids", "bottom_logits",
    },
}  # fmt: skip
STATISTICS = {
    "max", "frac_nonzero", "skew", "kurtosis", "quantile_data", "quantiles",
    "ranges_and_precisions",
}  # fmt: skip

# Loads the file with SAEDashboard's classes, gives it back, draws the page in the default layout.
LOADED = """
import json, sys, types
import numpy as np, torch
from sae_dashboard.components_config import ActsHistogramConfig, Column, SequencesConfig
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData, _SaeVisData
from sae_dashboard.utils_fns import FeatureStatistics
file, dense, page, logits = sys.argv[1:]
model = types.SimpleNamespace(tokenizer=types.SimpleNamespace(vocab={f"t{i}": i for i in range(6)}))
sequences = SequencesConfig(buffer=None, n_quantiles=5)
layout = SaeVisLayoutConfig([Column(ActsHistogramConfig()), Column(sequences)])
config = SaeVisConfig("x", [], **({} if logits == "yes" else {"feature_centric_layout": layout}))
data = SaeVisData.load_json(file, config, model, None)
back = _SaeVisData(data.feature_data_dict, data.feature_stats).to_dict()
back["feature_data_dict"] = {str(k): v for k, v in back["feature_data_dict"].items()}
assert json.loads(json.dumps(back)) == json.load(open(file))
theirs = FeatureStatistics.create(torch.from_numpy(np.load(dense)))
assert np.allclose(theirs.max, data.feature_stats.max)
assert np.allclose(theirs.frac_nonzero, data.feature_stats.frac_nonzero)
assert theirs.quantiles == data.feature_stats.quantiles
for a, b in zip(theirs.quantile_data, data.feature_stats.quantile_data, strict=True):
    # float32 there: a quantile that is nearly nothing may count as none, or as some.
    assert abs(len(a) - len(b)) <= 1
    n = min(len(a), len(b))
    assert np.allclose(a[len(a) - n:], b[len(b) - n:], atol=2e-3)
save_feature_centric_vis(data, page)
"""


def exported(database: FeatureDB, folder: Path, features: Any = None, **options: Any) -> Any:
    (file,) = database.export_pages(folder, "saevis", features, **options)
    assert file.name == "vis-0.json"
    return json.loads(file.read_text("ascii"))


def dense_of(database: FeatureDB, features: list[int]) -> np.ndarray[Any, Any]:
    """[features, tokens]"""
    rows = database.sql(
        "SELECT feature_id, sequence_id * 40 + token_idx AS at, strength FROM activations"
    ).to_pylist()
    dense = np.zeros((database.d_sae, 400), dtype=np.float32)
    for row in rows:
        dense[row["feature_id"], row["at"]] = row["strength"]
    return dense[features]


@pytest.fixture(scope="module")
def sae() -> FastSAE:
    torch.manual_seed(4)
    return FastSAE(d_in=tiny_r1_hidden(), d_sae=12, k=2)


def tiny_r1_hidden() -> int:
    config: dict[str, int] = json.loads((Path(tiny_r1.path()) / "config.json").read_text())
    return config["hidden_size"]


def test_structure_and_numbers(database: FeatureDB, tmp_path: Path) -> None:
    data = exported(database, tmp_path / "out", n=4, window=3)
    assert data.keys() == {"feature_data_dict", "feature_stats"}
    features = [int(feature) for feature in data["feature_data_dict"]]
    assert features == [f for f in range(12) if database.feature(f).count]
    assert 11 not in features  # dead
    for feature, entry in zip(features, data["feature_data_dict"].values(), strict=True):
        assert entry.keys() == {*FIELDS, "dfa_data", "decoder_weights_data"}
        for name, fields in FIELDS.items():
            assert entry[name].keys() == fields
        summary = database.feature(feature)
        assert sum(entry["acts_histogram_data"]["bar_heights"]) == summary.count
        groups = entry["sequence_data"]["seq_group_data"]
        assert groups[0]["title"] == f"TOP ACTIVATIONS<br>MAX = {summary.max:.3f}"
        shown = groups[0]["seq_data"]
        top = database.top(feature, 4, 3, per_sequence=1)
        assert len(shown) == len(top)
        for sequence, example in zip(shown, top, strict=True):
            assert sequence.keys() == FIELDS["prompt_data"]
            assert sequence["token_ids"] == [t.token for t in example.context]
            assert sequence["feat_acts"] == [round(t.strength, 4) for t in example.context]
            assert sequence["original_index"] == example.sequence_id
            assert sequence["qualifying_token_index"] == example.token_idx
            assert sequence["token_logits"] == [0.0] * len(example.context)
        contained = 0.0
        for group in groups[1:]:
            low, high = group["title"].split("<br>")[0].removeprefix("INTERVAL ").split(" - ")
            assert float(low) <= float(high)
            contained += float(group["title"].rpartition(" ")[2].removesuffix("%"))
        assert contained == pytest.approx(100 * summary.density, abs=0.01)
    found = data["feature_stats"]
    assert found.keys() == STATISTICS
    dense = dense_of(database, features).astype(np.float64)
    assert found["max"] == dense.max(1).tolist()
    assert found["frac_nonzero"] == pytest.approx((dense > 0).mean(1).tolist())
    assert len(found["quantiles"]) == 950 + 400 + 1000 + 1
    wanted = np.quantile(dense, found["quantiles"][:-1], axis=1).T
    for values, expected in zip(found["quantile_data"], wanted, strict=True):
        inside = expected[expected > 1e-6]
        assert len(values) == len(inside)
        assert np.allclose(values, inside, atol=1e-6)


def test_logits(database: FeatureDB, sae: FastSAE, tmp_path: Path) -> None:
    (file,) = Path(tiny_r1.path()).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        head = tensors.get_tensor("lm_head.weight").double()
        norm = tensors.get_tensor("model.norm.weight").double()
    expected = (sae.W_dec.detach().double() * norm) @ head.T
    expected -= expected.mean(1, keepdim=True)
    # Of sums of d_in float32 products, whatever their order.
    terms = (sae.W_dec.detach().double() * norm).abs() @ head.T.abs()
    bound = 2.0**-23 * head.shape[1] * float(terms.max())
    data = exported(database, tmp_path / "vis", [2, 3], sae=sae, model="tiny-r1")
    (batch,) = database.export_pages(
        tmp_path / "batch", "saedashboard", [2, 3], sae=sae, model="tiny-r1"
    )
    rows = json.loads(batch.read_text())["features"]
    for row, feature in zip(rows, (2, 3), strict=True):
        entry = data["feature_data_dict"][str(feature)]
        table = entry["logits_table_data"]
        most = expected[feature].topk(10).values
        assert np.allclose(table["top_logits"], most, atol=bound)
        least = -(-expected[feature]).topk(10).values
        assert np.allclose(table["bottom_logits"], least, atol=bound)
        ids = torch.tensor(table["top_token_ids"])
        assert np.allclose(expected[feature, ids], most, atol=bound)
        for name in ("logits_histogram_data", "acts_histogram_data"):
            heights = entry[name]["bar_heights"]
            total = len(head) if name[0] == "l" else database.feature(feature).count
            assert (len(heights), sum(heights)) == (50, total)
        sequence = entry["sequence_data"]["seq_group_data"][0]["seq_data"][0]
        at = expected[feature, torch.tensor(sequence["token_ids"])]
        assert np.allclose(sequence["token_logits"], at, atol=bound)
        assert np.allclose(row["pos_values"], most, atol=1e-4 + bound)
        assert len(row["pos_str"]) == len(row["neg_str"]) == 10
        assert all(isinstance(text, str) and text for text in row["pos_str"] + row["neg_str"])


def test_a_feature_asked_for_twice_is_there_once(database: FeatureDB, tmp_path: Path) -> None:
    found = []
    for name, features in (("once", [2, 3]), ("twice", [2, 2, 3])):
        (file,) = database.export_pages(tmp_path / name, "saevis", features)
        found.append(json.loads(file.read_text()))
    assert found[0] == found[1]


def test_what_does_not_belong(database: FeatureDB, sae: FastSAE, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="only one of sae and model"):
        database.export_pages(out, "saevis", sae=sae)
    with pytest.raises(ValueError, match="decoder writes 7 numbers, the residual"):
        database.export_pages(out, "saevis", sae=FastSAE(d_in=7, d_sae=12, k=2), model="tiny-r1")
    other = FastSAE(d_in=sae.W_dec.shape[1], d_sae=13, k=2)
    with pytest.raises(DatabaseError, match="d_sae = 12, this one has 13"):
        database.export_pages(out, "saevis", sae=other, model="tiny-r1")
    with pytest.raises(ValueError, match="none of these features has an example"):
        database.export_pages(out, "saevis", [11])
    assert not out.exists()


def test_the_command(database: FeatureDB, sae: FastSAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "sae")
    command = ["features", "export", str(database.path), str(tmp_path / "out"), "--to", "saevis"]
    given = ["--features", "1,2,11", "--sae", str(tmp_path / "sae"), "--model", "tiny-r1"]
    result = CliRunner().invoke(app, [*command, *given])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "vis-0.json").read_text())
    assert list(data["feature_data_dict"]) == ["1", "2"]
    assert data["feature_data_dict"]["1"]["logits_table_data"]["top_logits"]


@pytest.mark.parametrize("logits", ["no", "yes"])
def test_its_own_classes_load_it_and_draw_its_page(
    database: FeatureDB, sae: FastSAE, tmp_path: Path, logits: str
) -> None:
    """Needs sae-dashboard 0.8 here, or in the environment of $SAE_DASHBOARD_PYTHON."""
    python = os.environ.get("SAE_DASHBOARD_PYTHON", "")
    if not python and importlib.util.find_spec("sae_dashboard"):
        python = sys.executable
    if not python:
        pytest.skip("sae-dashboard is not installed")
    given: dict[str, Any] = {"sae": sae, "model": "tiny-r1"} if logits == "yes" else {}
    features = [f for f in range(12) if database.feature(f).count]
    exported(database, tmp_path / "out", **given)
    np.save(tmp_path / "dense.npy", dense_of(database, features))
    page = tmp_path / "page.html"
    names = [str(tmp_path / name) for name in ("out/vis-0.json", "dense.npy", "page.html")]
    subprocess.run([python, "-W", "ignore", "-c", LOADED, *names, logits], check=True)
    assert f'"{features[-1]}": ' in page.read_text()
