"""Search by meaning, with a real embedding model that is made here: no network, no stand-in."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from r1sae_fast.cli.main import app
from r1sae_fast.errors import CheckpointError, DatabaseError, MissingExtraError
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.semantic import vectors as kept
from r1sae_fast.features.semantic.model import load_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # joblib tells of systems without semaphores
    from model2vec import StaticModel

# Words by what they are about; words about the same have nearby vectors.
TOPICS = {
    "doubt": ["wait", "hesitation", "doubt", "reconsider", "mistake"],
    "sums": ["plus", "addition", "carry", "sum", "digits"],
    "animals": ["cat", "dog", "horse", "bird", "fish"],
}
LABELS = {
    0: "hesitation wait",
    1: "addition carry digits",
    2: "cat dog",
    3: "doubt",
    4: "unheard of",
    5: "horse addition",
}


def make_model(folder: Path, seed: int = 0) -> Path:
    """A static model of so many words, saved as model2vec saves it."""
    generator = np.random.default_rng(seed)
    words, rows = ["[UNK]"], [np.zeros(16)]
    for number, topic in enumerate(TOPICS.values()):
        for word in topic:
            words.append(word)
            rows.append(3 * np.eye(16)[number] + 0.1 * generator.standard_normal(16))
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = np.array(rows, dtype=np.float32)
    StaticModel(vectors, tokenizer, normalize=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("embedding") / "model")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A database whose features have the labels above, feature 6 a counted one alone."""
    path = tmp_path / "f.ddb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE tokens AS SELECT 0::BIGINT AS sequence_id, i::INTEGER AS token_idx, "
            "1::INTEGER AS token, 'x' AS decoded_token FROM range(9) t(i)"
        )
        connection.execute(
            "CREATE TABLE activations AS SELECT i::INTEGER AS feature_id, 0::BIGINT AS "
            "sequence_id, i::INTEGER AS token_idx, 1::FLOAT AS strength FROM range(7) t(i)"
        )
        connection.execute(
            "CREATE TABLE autointerp (feature_id INTEGER, label VARCHAR, model_name VARCHAR, "
            "prompt_version VARCHAR)"
        )
        rows = [(feature, label, "a-model", "1") for feature, label in LABELS.items()]
        rows += [(0, "cat", "statistics", "1"), (6, "fires on bird fish", "statistics", "1")]
        rows += [(7, "no token stands out: bird", "statistics", "1")]
        rows += [(5, "wait", "b-model", "1")]
        connection.executemany("INSERT INTO autointerp VALUES (?, ?, ?, ?)", rows)
    return path


def found(path: Path, text: str, model: Any, n: int = 20) -> list[tuple[int, str | None]]:
    with FeatureDB(path) as db:
        return [(hit.feature_id, hit.label) for hit in db.search(text, n, semantic=model)]


def test_labels_are_found_by_what_they_mean(labelled: Path, model: Path) -> None:
    with FeatureDB(labelled) as db:
        assert not len(db.search("reconsider"))  # no label has the word
        hits = db.search("reconsider", 3, semantic=model)
        assert {hit.feature_id for hit in hits} == {0, 3, 5}
        assert all(hit.matched == "meaning" and 0.9 < hit.score <= 1.0001 for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        # Of several labels the nearest; counted ones only where there is no other.
        assert {hit.label for hit in hits} == {"hesitation wait", "doubt", "wait"}
        assert hits.to_arrow().column_names == db.search("cat").to_arrow().column_names
        animals = [hit.feature_id for hit in db.search("bird", 3, semantic=model)]
        assert set(animals) == {2, 5, 6}
        assert animals[-1] == 5  # half of it is about sums
        assert 4 not in [hit.feature_id for hit in db.search("cat", 20, semantic=model)]
        with pytest.raises(ValueError, match="knows no word of 'quark'"):
            db.search("quark", semantic=model)
        with pytest.raises(ValueError, match="knows no word"):
            db.search("\udcff", semantic=model)
        with pytest.raises(ValueError, match="is empty"):
            db.search(" ", semantic=model)


def test_scores_are_the_cosines_of_the_models_own_vectors(labelled: Path, model: Path) -> None:
    own = StaticModel.from_pretrained(model)
    with FeatureDB(labelled) as db:
        for hit in db.search("dog sum", semantic=model):
            assert hit.label is not None
            a, b = own.encode(["dog sum", hit.label]).astype(np.float64)
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            # Sums of 16 products of float32, and the norms' roundings.
            assert hit.score == pytest.approx(cosine, abs=20 * 2.0**-24)


def test_vectors_are_kept_and_only_new_labels_embedded(
    labelled: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[str] = []
    encode = StaticModel.encode

    def counted(self: Any, texts: list[str], **options: Any) -> Any:
        embedded.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(StaticModel, "encode", counted)
    before = found(labelled, "doubt", model)
    assert sorted(embedded) == sorted([*LABELS.values(), "fires on bird fish", "wait", "doubt"])
    (file,) = labelled.with_name("f.ddb.vectors").iterdir()
    embedded.clear()
    assert found(labelled, "doubt", model) == before
    assert embedded == ["doubt"]  # the question alone
    with duckdb.connect(str(labelled)) as connection:  # one label changes, one is new
        connection.execute("UPDATE autointerp SET label = 'mistake' WHERE label = 'cat dog'")
        connection.execute("INSERT INTO autointerp VALUES (8, 'fish', 'a-model', '1')")
    embedded.clear()
    assert (2, "mistake") in found(labelled, "doubt", model)
    assert sorted(embedded) == ["doubt", "fish", "mistake"]
    # Another model: another file, whatever folder it lies in.
    other = make_model(labelled.parent / "other", seed=1)
    found(labelled, "doubt", other)
    names = {path.name for path in file.parent.iterdir()}
    assert len(names) == 2
    assert file.name in names


def test_what_a_stopped_embedding_made_is_not_made_again(
    labelled: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = found(labelled, "doubt", model)
    (file,) = labelled.with_name("f.ddb.vectors").iterdir()
    file.unlink()
    monkeypatch.setattr(kept, "_TEXTS", 1)
    monkeypatch.setattr(kept, "_SAVED", 2)
    encode, embedded = StaticModel.encode, 0

    def stops(self: Any, texts: list[str], **options: Any) -> Any:
        nonlocal embedded
        embedded += 1
        if embedded == 4:
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    monkeypatch.setattr(StaticModel, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        found(labelled, "doubt", model)
    embedded = 100
    assert found(labelled, "doubt", model) == expected
    assert embedded == 100 + len(LABELS) + 2 - 2 + 1  # two were saved; and the question


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign", "model"])
def test_vectors_that_are_not_these_are_refused(labelled: Path, model: Path, damage: str) -> None:
    found(labelled, "doubt", model)
    (file,) = labelled.with_name("f.ddb.vectors").iterdir()
    data = bytearray(file.read_bytes())
    message = "damaged"
    if damage == "cut":
        data = data[:-7]
    elif damage == "bit":
        data[-1] ^= 1
    elif damage == "foreign":
        data = bytearray((model / "model.safetensors").read_bytes())
    else:
        other = make_model(labelled.parent / "other", seed=1)
        found(labelled, "doubt", other)
        (theirs,) = {*file.parent.iterdir()} - {file}
        data, message = bytearray(theirs.read_bytes()), "holds vectors of another model"
    file.write_bytes(data)
    with pytest.raises(DatabaseError, match=f"{message}.*remove it"):
        found(labelled, "doubt", model)
    assert file.read_bytes() == data
    file.unlink()
    assert found(labelled, "doubt", model)


def test_where_nothing_can_be_written_vectors_are_made_anew(labelled: Path, model: Path) -> None:
    folder = labelled.with_name("f.ddb.vectors")
    folder.write_text("in the way")
    with pytest.warns(UserWarning, match="can't be kept there"):
        assert found(labelled, "doubt", model, 1) == [(3, "doubt")]
    folder.unlink()
    found(labelled, "doubt", model)
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()  # what is written can't take its place
    with pytest.warns(UserWarning, match="can't be kept there"):
        assert found(labelled, "doubt", model, 1) == [(3, "doubt")]
    assert [*folder.iterdir()] == [file]


def test_only_todays_labels_are_kept(labelled: Path, model: Path) -> None:
    found(labelled, "doubt", model)
    (file,) = labelled.with_name("f.ddb.vectors").iterdir()
    texts = {*LABELS.values(), "bird fish", "wait"}
    assert len(load_file(file)["keys"]) == len(texts)
    with duckdb.connect(str(labelled)) as connection:
        connection.execute("UPDATE autointerp SET label = 'mistake' WHERE label <> 'doubt'")
    found(labelled, "doubt", model)
    assert len(load_file(file)["keys"]) == 2


def test_an_object_that_encodes_is_taken_as_it_is(labelled: Path, model: Path) -> None:
    loaded = StaticModel.from_pretrained(model)
    assert found(labelled, "reconsider", loaded) == found(labelled, "reconsider", model)
    shapes: list[Callable[[list[str]], Any]] = [
        lambda texts: np.zeros(len(texts)),
        lambda texts: np.zeros((1, 3)),
        lambda texts: np.full((len(texts), 3), np.nan),
    ]
    for shape in shapes:
        encoder = type("Encoder", (), {"encode": lambda self, texts, s=shape: s(texts)})()
        with pytest.raises(ValueError, match=r"expected|NaN"):
            found(labelled, "doubt", encoder)
    with pytest.raises(TypeError, match="semantic is a int"):
        found(labelled, "doubt", 3)


def test_models_that_are_none(labelled: Path, model: Path, tmp_path: Path) -> None:
    for name in ("no/such", "./no/such/folder", "nobody/no-such-model"):
        with pytest.raises(FileNotFoundError, match="nothing is fetched unasked"):
            found(labelled, "doubt", name)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="model2vec can read"):
        found(labelled, "doubt", empty)
    with pytest.raises(CheckpointError, match="expected the folder"):
        found(labelled, "doubt", labelled)
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (empty / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(CheckpointError, match="it is a transformer: in Python pass it loaded"):
        found(labelled, "doubt", empty)
    broken = make_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="model2vec can read"):
        found(labelled, "doubt", broken)


def test_a_name_in_the_cache(model: Path, tmp_path: Path) -> None:
    """Laid out as the hub's cache is; in a process of its own, which reads where that lies."""
    repository = tmp_path / "hub" / "models--somebody--words"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file in model.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    code = (
        "from r1sae_fast.features.semantic.model import load_model\n"
        "print(load_model('somebody/words').checksum)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == load_model(model).checksum


def test_without_the_extra(labelled: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'r1sae-fast\[search\]'"):
        found(labelled, "doubt", model)


def test_without_labels(labelled: Path, model: Path) -> None:
    with duckdb.connect(str(labelled)) as connection:
        connection.execute("DELETE FROM autointerp")
    with pytest.raises(DatabaseError, match="autointerp is empty"):
        found(labelled, "doubt", model)
    with duckdb.connect(str(labelled)) as connection:
        connection.execute("DROP TABLE autointerp")
    with pytest.raises(DatabaseError, match="no table autointerp"):
        found(labelled, "doubt", model)


def test_the_command(labelled: Path, model: Path) -> None:
    arguments = ["features", "search", str(labelled), "reconsider", "--semantic", str(model)]
    result = CliRunner().invoke(app, [*arguments, "-n", "1"])
    assert result.exit_code == 0, result.output
    assert "meaning" in result.output
    result = CliRunner().invoke(app, [*arguments, "--json", "-n", "2"])
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [row["matched"] for row in rows] == ["meaning", "meaning"]
    assert rows[0]["score"] >= rows[1]["score"]
