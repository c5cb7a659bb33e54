"""What is drawn from a database: disjoint, held out, silent where it should be, repeatable."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from r1sae_fast.features import FeatureDB
from r1sae_fast.labels import LabelSettings
from r1sae_fast.labels.passages import MARKS, active_positions, choose_marks, marked, plain
from r1sae_fast.labels.prompts import (
    VERSION,
    detection_messages,
    explain_messages,
    fuzzing_messages,
)
from r1sae_fast.labels.questions import (
    detection_questions,
    explain_question,
    fuzzing_questions,
)
from r1sae_fast.labels.windows import Sampler, TooFewError, Window

Truth = Any  # conftest's


@pytest.fixture
def db(built: Path) -> Iterator[FeatureDB]:
    with FeatureDB(built) as db:
        yield db


@pytest.mark.parametrize("feature", range(4))
def test_sizes_and_disjointness(db: FeatureDB, truth: Truth, feature: int) -> None:
    sample = Sampler(db, LabelSettings()).sample(feature)
    assert (len(sample.explain), len(sample.test), len(sample.negatives)) == (40, 50, 50)
    windows = [*sample.explain, *sample.test, *sample.negatives]
    assert len({window.place for window in windows}) == 140
    assert len({window.texts for window in windows}) == 140
    for window in (*sample.explain, *sample.test):
        assert window.largest > 0
        assert plain(window) in truth.active[feature]
    for window in sample.negatives:
        assert set(window.strengths) == {0.0}
        assert plain(window) not in truth.active[feature]
        assert len(window.texts) <= 32
    # Every quantile gives a tenth: the weakest and the strongest are there in both.
    strongest = sorted(w.largest for w in sample.explain)
    tested = sorted(w.largest for w in sample.test)
    assert strongest[0] <= tested[10]
    assert strongest[-1] >= tested[-10]


def test_repeatable(db: FeatureDB) -> None:
    first = Sampler(db, LabelSettings()).sample(3)
    assert Sampler(db, LabelSettings()).sample(3) == first
    other = Sampler(db, LabelSettings(seed=23)).sample(3)
    assert other.test != first.test
    assert other.negatives != first.negatives


def test_few_windows_are_shared_out(db: FeatureDB) -> None:
    # More is asked for than there is.
    sample = Sampler(db, LabelSettings(explain=400, test=500, negatives=500)).sample(0)
    all_active = len(sample.explain) + len(sample.test)
    assert len(sample.explain) / all_active == pytest.approx(4 / 9, abs=0.03)
    assert 50 < len(sample.negatives) < 280


@pytest.mark.parametrize(("feature", "why"), [(12, "active in 1 windows"), (13, "in 0 windows")])
def test_too_few(db: FeatureDB, feature: int, why: str) -> None:
    with pytest.raises(TooFewError, match=why):
        Sampler(db, LabelSettings()).sample(feature)


def test_active_nearly_everywhere(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "dense.ddb"
    path.write_bytes(built.read_bytes())
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "INSERT INTO activations SELECT 13, sequence_id, token_idx, 1.0 FROM tokens "
            "WHERE sequence_id > 15 AND token_idx % 20 = 0"
        )
    with FeatureDB(path) as db, pytest.raises(TooFewError, match="in which it is not active"):
        Sampler(db, LabelSettings()).sample(13)


def test_marks() -> None:
    window = Window((0, 0), (" a", " b", "\n", " c"), (0.0, 2.0, 1.0, 0.5))
    assert marked(window, {1, 2}, MARKS[0]) == " a<< b↵>> c"
    assert marked(window, {0, 3}, MARKS[0]) == "<< a>> b↵<< c>>"
    assert marked(window, {0, 1, 2, 3}, MARKS[0]) == "<< a b↵ c>>"
    assert marked(window, (), MARKS[0]) == plain(window) == " a b↵ c"
    assert active_positions(window, 0.3) == (1, 2)
    assert choose_marks([window]) == ("<<", ">>")
    code = Window((0, 0), ("cout <", "< x"), (0.0, 1.0))  # made by two tokens together
    assert choose_marks([window, code]) == ("⟦", "⟧")


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (("<｜User｜>", "hi"), "⟨User⟩hi"),
        (("a", "<|im", "_end|>"), "a⟨im_end⟩"),
        ((" x", " <| y |> z"), " x ⟨ y ⟩ z"),
        (("a<b|c>d", "|>", "<think>"), "a<b|c>d|><think>"),
    ],
)
def test_control_tokens_do_no_harm(texts: tuple[str, ...], shown: str) -> None:
    window = Window((0, 0), texts, (1.0,) * len(texts))
    assert plain(window) == shown
    assert marked(window, range(len(texts)), MARKS[0]) == f"<<{shown}>>"


def test_questions(db: FeatureDB, truth: Truth) -> None:
    settings = LabelSettings()
    sample = Sampler(db, settings).sample(2)
    system, user = (content for _, content in explain_question(sample, settings))
    assert "LABEL:" in system
    assert user.count("Passage ") == user.count("Strengths: ") == 40
    assert "\x1b" not in user
    for make, known in ((detection_questions, truth.active), (fuzzing_questions, truth.right)):
        questions = make("the label", sample, settings)
        assert [len(q.truth) for q in questions] == [5] * 20
        assert sum(sum(q.truth) for q in questions) == 50
        assert make("the label", sample, settings) == questions
        for question in questions:
            text = question.messages[1][1]
            assert text.startswith("Label: the label\n\nPassage 1: ")
            passages = text.partition("Passage 1: ")[2].split("\n\nPassage ")
            passages[1:] = [p.partition(": ")[2] for p in passages[1:]]
            assert tuple(p in known[2] for p in passages) == question.truth


def test_wrong_marks_look_like_right_ones(db: FeatureDB) -> None:
    """As many, as long, at the same places: else a judge could tell them by their form."""
    settings = LabelSettings()
    sample = Sampler(db, settings).sample(2)
    shapes: dict[bool, list[int]] = {True: [], False: []}
    for question in fuzzing_questions("x", sample, settings):
        passages = question.messages[1][1].split("\n\nPassage ")[0:]
        for passage, right in zip(passages[-5:], question.truth, strict=True):
            marks = max(passage.count(mark[0]) for mark in MARKS)
            shapes[right].append(marks)
    assert 0 not in shapes[False]
    mean = {right: sum(counts) / len(counts) for right, counts in shapes.items()}
    # The wrong ones repeat counts of the right ones, drawn at random: six standard errors.
    spread = (sum((n - mean[True]) ** 2 for n in shapes[True]) / 50) ** 0.5
    assert abs(mean[True] - mean[False]) < 6 * spread * (2 / 50) ** 0.5


def test_version_of_the_prompts() -> None:
    """A change of any word of a prompt is a new version: set both, here and there."""
    import hashlib

    marks = MARKS[0]
    texts = (
        explain_messages(["a"], marks),
        detection_messages("l", ["a", "b"]),
        fuzzing_messages("l", ["a", "b"], marks),
    )
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:16]
    assert (VERSION, digest) == ("r1sae-label-1", "ebd9df7cbfb04e50")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explain": 45}, "multiples of quantiles"),
        ({"test": 0}, "test is 0"),
        ({"threshold": 0.0}, "threshold is 0"),
        ({"scorers": ("guess",)}, "no scorer 'guess'"),
        ({"min_windows": 1}, "at least 2"),
    ],
)
def test_settings_without_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelSettings(**options)


def test_settings_are_marked() -> None:
    assert LabelSettings().prompt_version == VERSION
    assert LabelSettings(explain_tokens=9, score_tokens=9).prompt_version == VERSION
    versions = {LabelSettings(**{k: 20}).prompt_version for k in ("explain", "test", "seed")}
    assert len(versions) == 3
    assert all(version.startswith(f"{VERSION}+") for version in versions)


def test_tokens_without_text(database: Path) -> None:
    from r1sae_fast.errors import LabelError

    with duckdb.connect(str(database)) as connection:
        connection.execute("UPDATE tokens SET decoded_token = NULL")
    with FeatureDB(database) as db, pytest.raises(LabelError, match="--tokenizer"):
        Sampler(db, LabelSettings()).sample(1)
