"""Finding by statistics and by text; the same frames from Python and from the command."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.query import Frame
from r1sae_fast.features.query.ranking import bm25, closeness, words_of


def test_a_condition_chooses_what_sql_chooses(database: FeatureDB) -> None:
    found = database.find(
        "thinking_density > 1.1 * prompt_density and count >= 20", sort="-density", n=None
    )
    expected = database.sql(
        "SELECT feature_id FROM features WHERE density_thinking > 1.1 * density_prompt "
        "AND count >= 20 ORDER BY density DESC, feature_id"
    )
    assert 0 < len(found) < 12
    assert found.to_arrow()["feature_id"].to_pylist() == expected["feature_id"].to_pylist()
    # What was asked about is shown.
    assert {"density_thinking", "density_prompt", "count", "density"} <= set(found.columns)


@pytest.mark.parametrize("column", ["max", "count", "label", "detection", "mean"])
@pytest.mark.parametrize("sign", ["", "-"])
def test_sorts_by_any_column_with_the_unknown_last(
    column: str, sign: str, database: FeatureDB
) -> None:
    found = database.find(sort=sign + column, n=None, columns=["feature_id", column]).to_dicts()
    direction = "DESC" if sign else "ASC"
    known = [r for r in database.statistics.to_pylist() if r[column] is not None]
    known.sort(key=lambda r: r["feature_id"])
    known.sort(key=lambda r: r[column], reverse=sign == "-")
    unknown = [r["feature_id"] for r in database.statistics.to_pylist() if r[column] is None]
    assert [r["feature_id"] for r in found] == [r["feature_id"] for r in known] + unknown, direction


def test_several_keys_and_columns(database: FeatureDB) -> None:
    found = database.find(sort="max,-count", n=5, columns=["count", "thinking_density"])
    assert found.columns == ("count", "density_thinking")
    expected = database.sql(
        "SELECT count FROM features ORDER BY max, count DESC, feature_id LIMIT 5"
    )
    assert [row["count"] for row in found] == expected["count"].to_pylist()


def test_what_is_wrong_is_said(database: FeatureDB) -> None:
    with pytest.raises(ValueError, match=r"no column 'densty'; did you mean density\?"):
        database.find(sort="-densty")
    with pytest.raises(ValueError, match=r"no column 'x'.*There are: .*feature_id"):
        database.find(columns=["x"])
    with pytest.raises(ValueError, match="n is -1"):
        database.find(n=-1)


def test_the_label_that_scored_best_stands_for_the_feature(database: FeatureDB) -> None:
    (row,) = database.find(
        "feature_id == 3", columns=["label", "model_name", "detection", "fuzzing"]
    )
    assert row == {"label": "proof", "model_name": "judge-b", "detection": 0.95, "fuzzing": 0.8}
    assert len(database.find("detection > 0.9")) == 1


def test_another_labeller_may_be_chosen(database: FeatureDB) -> None:
    with FeatureDB(database.path) as db:
        db.labeller = "judge-a"
        columns = ["label", "detection"]
        (row,) = db.find("feature_id == 3", columns=columns)
        assert row == {"label": "something else", "detection": 0.55}
        db.labeller = "judge-b"
        (row,) = db.find("feature_id == 3", columns=columns)
        assert row == {"label": "proof", "detection": 0.95}


def test_frames_of_every_library_are_equal_and_shared(database: FeatureDB) -> None:
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    for frame in (database.find(n=None), database.search("proof")):
        table = frame.to_arrow()
        assert frame.to_polars().to_dicts() == table.to_pylist()
        assert polars.DataFrame(frame).equals(frame.to_polars())
        assert pa.table(frame).equals(table)
        shared = frame.to_pandas(backend="pyarrow")
        assert pa.Table.from_pandas(shared, preserve_index=False).to_pylist() == table.to_pylist()
        assert isinstance(frame.to_pandas(), pandas.DataFrame)
    table = database.find(n=None).to_arrow()
    address = table["density"].chunk(0).buffers()[1].address
    series = database.find(n=None).to_polars()["density"]
    assert series.to_list() == table["density"].to_pylist()
    frame = database.find(n=None)
    address = frame.to_arrow()["density"].chunk(0).buffers()[1].address
    again = pa.table(frame.to_polars())["density"].chunk(0).buffers()[1].address
    assert again == address  # polars holds the same memory


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".arrow"])
def test_the_command_gives_the_same_frame(suffix: str, database: FeatureDB, tmp_path: Path) -> None:
    out = tmp_path / f"found{suffix}"
    where = "count > 10 and known(label)"
    arguments = ["features", "find", str(database.path), where, "--sort=-max,feature_id"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    expected = database.find(where, sort=["-max", "feature_id"]).to_arrow()
    if suffix == ".parquet":
        assert pq.read_table(out).equals(expected)
    elif suffix == ".arrow":
        assert pa.ipc.open_file(out).read_all().equals(expected)
    elif suffix == ".jsonl":
        assert out.read_bytes().isascii()
        assert [json.loads(line) for line in out.read_text().splitlines()] == expected.to_pylist()
    else:
        assert len(out.read_text().splitlines()) == expected.num_rows + 1
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    assert [json.loads(line) for line in printed.output.splitlines()] == expected.to_pylist()
    again = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert again.exit_code == 1
    assert "exists already" in again.output


def test_no_formula_goes_into_a_csv(tmp_path: Path) -> None:
    """Other kinds of files keep every text as it is."""
    formulas = ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", "＠x"]
    harmless = ["a=b", " wait", "'x", "", None, '"=1']
    texts = [*formulas, *harmless]
    numbers = [-float(i) for i in range(len(texts))]
    table = pa.table({"label": texts, "number": numbers, "list": [[1]] * len(texts)})
    large = table.set_column(0, "label", pa.array(texts, pa.large_string()))
    for frame in (Frame(table), Frame(large)):
        path = frame.write(tmp_path / "x.csv", overwrite=True)
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["label", "number"]
        expected = [f"'{text}" for text in formulas] + [text or "" for text in harmless]
        assert [row[0] for row in rows[1:]] == expected
        assert [float(row[1]) for row in rows[1:]] == numbers
        assert (
            pq.read_table(frame.write(tmp_path / "x.parquet", overwrite=True)) == frame.to_arrow()
        )
        lines = frame.write(tmp_path / "x.jsonl", overwrite=True).read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == texts


def test_a_file_of_no_known_kind_is_refused(database: FeatureDB, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of \.parquet"):
        database.find().write(tmp_path / "x.xlsx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_a_table_and_nothing_raw(database: FeatureDB) -> None:
    result = CliRunner().invoke(app, ["features", "find", str(database.path), "feature_id == 4"])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "␛[2Jclear" in result.output
    nothing = CliRunner().invoke(app, ["features", "find", str(database.path), "count < 0"])
    assert nothing.output == "no feature found\n"
    wrong = CliRunner().invoke(app, ["features", "find", str(database.path), "count = 0"])
    assert (wrong.exit_code, wrong.output.count("\n")) == (1, 1)


# -- by text ------------------------------------------------------------------------------------


def test_labels_with_all_words_come_first_then_short_and_whole(database: FeatureDB) -> None:
    hits = database.search("proof")
    assert [hit.feature_id for hit in hits] == [3, 0, 2]  # the shorter, the better
    assert [hit.model_name for hit in hits] == ["judge-b", "judge-a", "judge-a"]
    both = database.search("PROOF waits")
    assert both[0].feature_id == 0
    assert both[0].score > 1 > both[1].score
    assert {hit.feature_id for hit in both} == {0, 2, 3}


def test_a_label_and_a_token_add_up(database: FeatureDB) -> None:
    (first, second, *_) = database.search("wait")
    assert (first.feature_id, first.matched, first.token) == (1, "label", " Wait")
    assert first.score > 2 - 0.2 > second.score  # the whole word, and the token alone
    assert second.feature_id == 0  # a part of a word


def test_closeness_counts_whole_words_and_shares_of_words() -> None:
    assert closeness("wait", "wait, wait") == 2
    assert closeness("wait", "waiting") == pytest.approx(4 / 7)
    assert closeness("[so]", "a [so] b") == 1
    assert closeness("so", "a [so] b") == 1
    assert closeness("x", "wait") == 0
    assert words_of("Wait  SO wait") == ["wait", "so"]
    assert words_of("\n") == ["\n"]


def test_bm25_is_the_formula() -> None:
    # One part, in 1 of 3 texts of mean length 4, once: idf = ln(1 + 2.5 / 1.5).
    (score,) = bm25(["wait"], ["wait"], 3, 4.0)
    assert score == pytest.approx(0.980829253 * 2.2 / 2.2)
    rare, common = bm25(["rare"], ["rare"], 100, 4.0)[0], bm25(["a"], ["a"] * 90, 100, 1.0)[0]
    assert rare > common > 0
    short, long = bm25(["wait"], ["wait", "wait and much more"], 9, 8.0)
    assert short > long
