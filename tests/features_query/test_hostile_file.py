"""Files whose statistics and labels are not what a build would write: shown, or refused by name."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from rich.console import Console

from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB


def changed(database: FeatureDB, path: Path, statement: str) -> FeatureDB:
    shutil.copy(database.path, path)
    with duckdb.connect(str(path)) as connection:
        connection.execute(statement)
    return FeatureDB(path)


def looked_at(db: FeatureDB, folder: Path) -> str:
    """All ways in which a feature is shown; what the terminal gets."""
    shown = io.StringIO()
    Console(file=shown, width=100).print(db.show(3))
    assert db.show(3)._repr_html_()
    assert len(db.find(n=None)) == 12
    db.search("proof")
    db.top(3)
    for kind in ("jsonl", "neuronpedia", "saedashboard", "saevis"):
        db.export_pages(folder / kind, kind, [3])  # type: ignore[arg-type]  # one of these
    return shown.getvalue()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = '[' WHERE key = 'histogram_edges'",
        "UPDATE meta SET value = '[1, 2]' WHERE key = 'histogram_edges'",
        "UPDATE meta SET value = '[\"a\"]' WHERE key = 'histogram_edges'",
        "UPDATE meta SET value = '7' WHERE key = 'histogram_edges'",
        "UPDATE meta SET value = repeat('[', 100000) WHERE key = 'codes_metadata'",
        'UPDATE meta SET value = \'{"activations": {"layer": "²"}}\' '
        "WHERE key = 'codes_metadata'",
        "DELETE FROM meta WHERE key = 'histogram_edges'",
        "UPDATE features SET histogram = NULL",
        "UPDATE features SET histogram = [1]",
        "UPDATE features SET count = NULL",
        "UPDATE features SET max = 'nan', mean = 'inf'",
        "UPDATE autointerp SET label = NULL",
        "UPDATE activations SET strength = 'nan' WHERE feature_id = 3",
        "UPDATE activations SET strength = 'inf' WHERE feature_id = 3",
        "UPDATE features SET max = NULL, mean = NULL",
        "UPDATE features SET max = 'inf'",
        "UPDATE features SET histogram = list_transform(histogram, lambda x, i: "
        "CASE WHEN i > 1 THEN x END)",
        "UPDATE intervals SET low = NULL",
        "UPDATE intervals SET sequence_id = NULL",
        "UPDATE intervals SET strength = 'inf'",
        "UPDATE examples SET strength = 'inf'",
        "UPDATE token_lift SET share = NULL",
        "UPDATE token_lift SET lift = 'inf'",
        "UPDATE neighbours SET other_id = 999999",
        "UPDATE coactivations SET other_id = NULL",
        "UPDATE coactivations SET pmi = NULL",
        "UPDATE tokens SET token = NULL, decoded_token = NULL",
        "UPDATE examples SET rank = 1",
    ],
)
def test_shown_all_the_same(database: FeatureDB, tmp_path: Path, statement: str) -> None:
    with changed(database, tmp_path / "x.ddb", statement) as db:
        assert "feature 3" in looked_at(db, tmp_path)


@pytest.mark.parametrize(
    "told",
    [
        "'abc'",
        "'-5'",
        "'99999999999999'",
        pytest.param(f"'{'9' * 5000}'", id="5000 digits"),
        f"'{'0' * 20}{'9' * 14}'",
        "NULL",
        "'²'",
        "''",
    ],
)
def test_a_number_of_features_that_is_none(database: FeatureDB, tmp_path: Path, told: str) -> None:
    statement = f"UPDATE meta SET value = {told} WHERE key = 'd_sae'"
    with changed(database, tmp_path / "x.ddb", statement) as db:
        tries: list[Callable[[], object]] = [
            lambda: db.feature(3),
            lambda: db.export_pages(tmp_path / "out", "jsonl"),
        ]
        for one in tries:
            with pytest.raises(DatabaseError, match="meta says d_sae"):
                one()


def test_a_feature_without_its_row(database: FeatureDB, tmp_path: Path) -> None:
    statement = "DELETE FROM features WHERE feature_id = 3"
    with (
        changed(database, tmp_path / "x.ddb", statement) as db,
        pytest.raises(DatabaseError, match="no row of feature 3"),
    ):
        db.feature(3)


def test_labels_and_tokens_of_megabytes_are_cut_where_they_are_shown(
    database: FeatureDB, tmp_path: Path
) -> None:
    statement = (
        "UPDATE autointerp SET label = repeat('x', 3000000), model_name = repeat('m', 1000000); "
        "UPDATE tokens SET decoded_token = repeat('y', 1000000) WHERE sequence_id = 1; "
        "UPDATE token_lift SET decoded_token = repeat('z', 1000000) WHERE feature_id = 3; "
        "UPDATE tokens SET segment = repeat('s', 1000000) WHERE sequence_id = 1"
    )
    with changed(database, tmp_path / "x.ddb", statement) as db:
        shown = io.StringIO()
        Console(file=shown, width=100).print(db.show(3))
        assert len(shown.getvalue()) < 100_000
        assert len(db.show(3)._repr_html_()) < 200_000
        assert len(json.dumps(db.top(3)[0].text)) < 10_000
        assert len(db.labels(3)[0].label) == 3_000_000  # as it is, in data
