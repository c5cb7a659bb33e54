"""A built database holds what the codes hold, neither more nor less; a build is whole or not."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import duckdb
import numpy as np
import pytest
import torch

from r1sae_fast.errors import DatabaseError
from r1sae_fast.examples import Examples, collect_examples
from r1sae_fast.features import FeatureDB
from r1sae_fast.features.new_file import new_file
from r1sae_fast.shards import CodeShards, CodeWriter

Query = Callable[[str], list[tuple[Any, ...]]]
World = Any  # conftest's
SEGMENTS = {0: "prompt", 1: "thinking", 2: "response", 255: None}


def test_tokens_are_the_codes_tokens(world: World, query: Query) -> None:
    rows = query("SELECT sequence_id, token_idx, token, decoded_token, segment FROM tokens")
    assert rows == [
        (sequence, place, token, world.texts[token], SEGMENTS[segment])
        for sequence, place, token, segment in zip(
            world.sequence_id.tolist(),
            world.position.tolist(),
            world.tokens.tolist(),
            world.segment.tolist(),
            strict=True,
        )
    ]


def test_activations_are_the_codes_sorted_for_reading(world: World, query: Query) -> None:
    rows = query("SELECT feature_id, sequence_id, token_idx, strength FROM activations")
    assert len(rows) == len(world.activations)
    assert set(rows) == world.activations
    assert rows == sorted(rows, key=lambda row: row[:3])


def test_the_released_columns_come_first_and_keep_their_names(query: Query) -> None:
    released = {
        "tokens": ["sequence_id", "token_idx", "token", "decoded_token"],
        "activations": ["feature_id", "sequence_id", "token_idx", "strength"],
        "autointerp": [
            "feature_id", "label", "quality", "interestingness", "model_name", "prompt_version",
        ],
    }  # fmt: skip
    for table, columns in released.items():
        found = [row[0] for row in query(f"SELECT column_name FROM (DESCRIBE {table})")]
        assert found[: len(columns)] == columns


def test_features_hold_the_statistics(world: World, database: FeatureDB, query: Query) -> None:
    rows = query("SELECT * FROM features ORDER BY feature_id")
    examples = collect_examples(CodeShards(database.path.parent / "codes"))
    dense = world.dense.astype(np.float64)
    for feature, row in enumerate(rows):
        column = dense[:, feature]
        active = column > 0
        identity, count, density, mean, largest, histogram, *segments, _, clarity = row
        assert (identity, count, largest) == (feature, active.sum(), column.max())
        assert density == active.mean()
        assert histogram == examples.histogram[feature].tolist()
        assert sum(histogram) == count
        assert mean == (pytest.approx(column[active].mean(), rel=1e-12) if count else None)
        expected = [active[world.segment == number].mean() for number in range(3)]
        assert segments == pytest.approx(expected, rel=1e-12)
        assert 0 <= clarity <= 1
    assert len(rows) == world.dense.shape[1]


def test_examples_are_the_strongest_activations(database: FeatureDB, query: Query) -> None:
    stored = query("SELECT * FROM examples ORDER BY feature_id, rank")
    strongest = query("""
        SELECT feature_id, row_number() OVER w, sequence_id, token_idx, strength
        FROM (SELECT * FROM activations QUALIFY row_number() OVER
              (PARTITION BY feature_id, sequence_id ORDER BY strength DESC, token_idx) = 1)
        WINDOW w AS (PARTITION BY feature_id ORDER BY strength DESC, sequence_id, token_idx)
        QUALIFY row_number() OVER w <= 20 ORDER BY ALL""")
    assert stored == strongest
    assert database.metadata["examples_per_feature"] == "20"


def test_token_lift_counts_tokens_and_their_neighbours(world: World, query: Query) -> None:
    rows = query("SELECT * FROM token_lift ORDER BY feature_id, token_offset, rank")
    place_of = {
        at: row
        for row, at in enumerate(
            zip(world.sequence_id.tolist(), world.position.tolist(), strict=True)
        )
    }
    found = 0
    for offset in (-1, 0, 1):
        neighbour = {
            row: place_of[sequence, place + offset]
            for (sequence, place), row in place_of.items()
            if (sequence, place + offset) in place_of
        }
        base = Counter(int(world.tokens[to]) for to in neighbour.values())
        for feature in range(world.dense.shape[1]):
            active = [row for row in neighbour if world.dense[row, feature] > 0]
            counts = Counter(int(world.tokens[neighbour[row]]) for row in active)
            weights: Counter[int] = Counter()
            for row in active:
                weights[int(world.tokens[neighbour[row]])] += world.dense[row, feature].item()
            listed = [row for row in rows if row[:2] == (feature, offset)]
            assert [row[2] for row in listed] == list(range(1, min(len(counts), 10) + 1))
            scores = [row[-1] for row in listed]
            assert scores == sorted(scores, reverse=True)
            for _, _, _, token, text, count, share, weighted, chance, lift, _ in listed:
                assert text == world.texts[token]
                assert count == counts[token]
                assert share == pytest.approx(count / len(active))
                assert weighted == pytest.approx(weights[token] / weights.total(), abs=1e-6)
                assert chance == pytest.approx(base[token] / base.total())
                assert lift == pytest.approx(share / chance)
                found += 1
    assert found == len(rows) > 100


def test_labels_say_what_the_features_were_made_for(query: Query) -> None:
    labels = dict(query("SELECT feature_id, label FROM autointerp"))
    assert labels[1].startswith('fires on " Wait" (lift ')
    assert "100% of activations" in labels[1]
    assert labels[2].startswith('fires after " Wait" (lift ')
    assert labels[3].startswith('fires before " Wait" (lift ')
    assert labels[4].startswith('fires on " so" or " 7" (lift ') or labels[4].startswith(
        'fires on " 7" or " so" (lift '
    )
    assert labels[5] == "no token stands out; 100% in the response (lift 10×)"
    assert labels[15] == "no token stands out"
    assert labels[22].startswith("active only once, too few for statistics: on ")
    assert labels[23] == "dead: never active in these 480 tokens"
    origins = query(
        "SELECT DISTINCT model_name, prompt_version, quality, interestingness FROM autointerp"
    )
    assert origins == [("statistics", "token-lift-1", None, None)]


def test_meta_says_what_it_is_of(world: World, database: FeatureDB) -> None:
    meta = database.metadata
    assert (meta["format"], meta["version"], meta["d_sae"]) == ("r1sae-features", "3", "24")
    assert (meta["rows"], meta["sae"], meta["layer"]) == (str(len(world.tokens)), "test", "3")
    assert len(database.histogram_edges or ()) == 97


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_building_twice_gives_the_same_tables(
    seed: int, tmp_path: Path, make_world: Callable[..., World]
) -> None:
    world = make_world(seed, sequences=4)
    codes = world.write(tmp_path / "codes", rows_per_shard=11)
    examples = collect_examples(codes, n=5)
    with (
        FeatureDB.build(tmp_path / "a.ddb", codes, examples, world.decode) as a,
        FeatureDB.build(tmp_path / "b.ddb", codes, None, world.decode, n=5) as b,
    ):
        for table in a.tables:
            assert a.sql(f"SELECT * FROM {table}").equals(b.sql(f"SELECT * FROM {table}")), table


def test_without_text_and_with_unknown_segments(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    world = make_world(4, sequences=2)
    world = replace(world, segment=np.full_like(world.segment, 255))
    with FeatureDB.build(tmp_path / "f.ddb", world.write(tmp_path / "codes")) as db:
        assert db.sql("SELECT DISTINCT decoded_token, segment FROM tokens").to_pylist() == [
            {"decoded_token": None, "segment": None}
        ]
        assert set(db.feature(1).segment_density.values()) == {None}
        assert db.feature(1).labels[0].label.startswith("fires on token 1 (lift ")
        assert "«[1]»" in db.top(1, 1)[0].text


def test_a_tokenizer_decodes_special_tokens_too(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    world = make_world(5, sequences=2)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(12)}, unk_token="0"))
    tokenizer.add_special_tokens([AddedToken("1", special=True)])
    with FeatureDB.build(
        tmp_path / "f.ddb", world.write(tmp_path / "codes"), decode=tokenizer
    ) as db:
        texts = db.sql("SELECT DISTINCT token::VARCHAR = decoded_token AS same FROM tokens")
        assert texts.to_pylist() == [{"same": True}]


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["tokens", "sequence_id", "position"])
def test_rows_of_unknown_place_are_named(
    column: str, tmp_path: Path, make_world: Callable[..., World]
) -> None:
    world = make_world(6, sequences=2)
    values = getattr(world, column).copy()
    values[41] = -1
    codes = replace(world, **{column: values}).write(tmp_path / "codes")
    with pytest.raises(ValueError, match=f"{column} of row 41 is unknown"):
        FeatureDB.build(tmp_path / "f.ddb", codes)
    assert [file.name for file in tmp_path.iterdir()] == ["codes"]


def test_two_rows_at_one_place_are_refused(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    world = make_world(7, sequences=2)
    codes = replace(world, sequence_id=np.full_like(world.sequence_id, 4)).write(tmp_path / "codes")
    with pytest.raises(ValueError, match="2 rows are at position 0 of sequence 4"):
        FeatureDB.build(tmp_path / "f.ddb", codes)


def test_examples_of_other_codes_are_refused(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    codes = make_world(8, sequences=2).write(tmp_path / "codes")
    longer = make_world(8, sequences=3).write(tmp_path / "longer")
    other = make_world(9, sequences=2).write(tmp_path / "other")
    with pytest.raises(ValueError, match=r"d_sae = 24 and 120 rows.*d_sae = 24 and 80 rows"):
        FeatureDB.build(tmp_path / "f.ddb", codes, collect_examples(longer))
    with pytest.raises(ValueError, match=r"examples count \d+ activations of feature \d+"):
        FeatureDB.build(tmp_path / "f.ddb", codes, collect_examples(other))
    assert not (tmp_path / "f.ddb").exists()


def test_a_decode_that_fails_is_reported_as_it_is(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    codes = make_world(10, sequences=1).write(tmp_path / "codes")

    def fails(token: int) -> str:
        raise LookupError(f"no token {token}")

    with pytest.raises(LookupError, match="no token"):
        FeatureDB.build(tmp_path / "f.ddb", codes, decode=fails)
    with pytest.raises(TypeError, match=r"decode\(\d+\) gave a bytes; expected a str"):
        FeatureDB.build(tmp_path / "f.ddb", codes, decode=lambda token: b"x")
    with pytest.raises(TypeError, match="decode is a int; expected a function"):
        FeatureDB.build(tmp_path / "f.ddb", codes, decode=3)
    assert [file.name for file in tmp_path.iterdir()] == ["codes"]


def test_a_file_is_replaced_only_on_request_and_only_when_all_went_well(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    path = tmp_path / "f.ddb"
    first = make_world(11, sequences=1).write(tmp_path / "first")
    second = make_world(12, sequences=2).write(tmp_path / "second")
    FeatureDB.build(path, first).close()
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        FeatureDB.build(path, second)
    with pytest.raises(TypeError, match="gave a int"):
        FeatureDB.build(path, second, decode=lambda token: token, overwrite=True)
    assert path.read_bytes() == before
    with FeatureDB.build(path, second, overwrite=True) as db:
        assert db.metadata["rows"] == "80"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FeatureDB.build(tmp_path / "none" / "f.ddb", first)


class _StopNow(Exception):
    """Raised by a signal's handler, as ctrl-c raises KeyboardInterrupt."""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs a spare signal")
def test_a_signal_stops_a_build_and_leaves_the_old_file(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    path = tmp_path / "f.ddb"
    codes = make_world(16, sequences=2).write(tmp_path / "codes")
    FeatureDB.build(path, codes).close()
    old = path.read_bytes()

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StopNow

    def decode(token: int) -> str:
        # Half-way through the tokens, on one of DuckDB's threads.
        signal.raise_signal(signal.SIGALRM)
        return str(token)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(_StopNow):
            FeatureDB.build(path, codes, decode=decode, overwrite=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert path.read_bytes() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codes", "f.ddb"]


# Builds, and kills itself where the argument says.
_KILLED = """
import os, signal, sys
from r1sae_fast.features import FeatureDB
path, codes, moment = sys.argv[1:]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
class Fatal:
    def __str__(self): die()
decode = die if moment == "start" else str
FeatureDB.build(path, codes, decode=decode, metadata={"x": Fatal()}, overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["start", "end"])
def test_a_killed_build_leaves_the_old_file_and_can_be_repeated(
    moment: str, tmp_path: Path, make_world: Callable[..., World]
) -> None:
    path = tmp_path / "f.ddb"
    codes = make_world(13, sequences=2).write(tmp_path / "codes")
    FeatureDB.build(path, codes).close()
    before = path.read_bytes()
    command = [sys.executable, "-c", _KILLED, str(path), str(codes), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert (tmp_path / "f.ddb.tmp").exists()
    with FeatureDB.build(path, codes, decode=str, overwrite=True) as db:
        assert db.top(1, 1)[0].token is not None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codes", "f.ddb"]


_BUILDING = """
import duckdb, sys
with duckdb.connect(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(os.name != "posix", reason="posix locks")
def test_two_builds_of_one_file_do_not_meet(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    codes = make_world(14, sequences=1).write(tmp_path / "codes")
    temporary = tmp_path / "f.ddb.tmp"
    with subprocess.Popen(
        [sys.executable, "-c", _BUILDING, str(temporary)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(DatabaseError, match="another process is building this database"):
            FeatureDB.build(tmp_path / "f.ddb", codes)
        assert temporary.exists()
        other.communicate("\n")
    duckdb.connect(str(temporary)).close()  # it was left whole


_LOCKED = """
import sys
from pathlib import Path
from r1sae_fast.features.lock import building_lock
with building_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_a_build_that_has_written_nothing_yet_is_left_alone(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    codes = make_world(17, sequences=1).write(tmp_path / "codes")
    path = tmp_path / "f.ddb"
    with subprocess.Popen(
        [sys.executable, "-c", _LOCKED, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(DatabaseError, match="another process is building this database"):
            FeatureDB.build(path, codes)
        other.communicate("\n")
    FeatureDB.build(path, codes).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codes", "f.ddb"]


def test_a_build_within_a_build_leaves_the_first_one_whole(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    codes = make_world(18, sequences=1).write(tmp_path / "codes")
    path = tmp_path / "f.ddb"
    refused = []

    def decode(token: int) -> str:
        if not refused:
            with pytest.raises(DatabaseError, match="is building this database") as info:
                FeatureDB.build(path, codes)
            refused.append(info.value)
        return str(token)

    with FeatureDB.build(path, codes, decode=decode) as db:
        assert (len(refused), db.metadata["rows"]) == (1, "40")


def test_an_open_database_is_not_replaced(tmp_path: Path, make_world: Callable[..., World]) -> None:
    path = tmp_path / "f.ddb"
    first = make_world(19, sequences=1).write(tmp_path / "first")
    second = make_world(20, sequences=2).write(tmp_path / "second")
    with FeatureDB.build(path, first) as db:
        before = path.read_bytes()
        with pytest.raises(DatabaseError, match=r"f\.ddb: this process has the database open"):
            FeatureDB.build(path, second, overwrite=True)
        opened = []

        def decode(token: int) -> str:
            if not opened:
                opened.append(FeatureDB(path))
            return str(token)

        db.close()
        with pytest.raises(DatabaseError, match=r"f\.ddb: this process has the database open"):
            FeatureDB.build(path, second, decode=decode, overwrite=True)
        opened[0].close()
        assert path.read_bytes() == before
    with FeatureDB.build(path, second, overwrite=True) as db:
        assert db.metadata["rows"] == "80"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.ddb", "first", "second"]


# Builds with little room for files.
_LIMITED = """
import resource, sys
from r1sae_fast.examples import collect_examples
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB
path, codes = sys.argv[1:]
examples = collect_examples(codes)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    FeatureDB.build(path, codes, examples, overwrite=True)
except DatabaseError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="posix limits")
def test_a_full_disk_is_told_and_leaves_the_old_file(
    tmp_path: Path, make_world: Callable[..., World]
) -> None:
    path = tmp_path / "f.ddb"
    codes = make_world(21, sequences=1).write(tmp_path / "codes")
    FeatureDB.build(path, codes).close()
    before = path.read_bytes()
    command = [sys.executable, "-c", _LIMITED, str(path), str(codes)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "f.ddb: the database could not be built: " in told.stdout
    assert f"make room in {tmp_path}" in told.stdout
    assert told.stderr == ""
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codes", "f.ddb"]


def test_duckdb_shows_no_bar_of_its_own(
    database: FeatureDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = duckdb.connect
    setting = "SELECT current_setting('enable_progress_bar')"

    def with_bar(*args: Any, **options: Any) -> duckdb.DuckDBPyConnection:
        """As in a notebook, where DuckDB turns it on."""
        connection = connect(*args, **options)
        if not options.get("read_only"):
            connection.execute("SET enable_progress_bar = true")
            assert connection.execute(setting).fetchone() == (True,)
        return connection

    monkeypatch.setattr(duckdb, "connect", with_bar)
    with new_file(tmp_path / "f.ddb", "", {}) as file:
        assert file.connection.execute(setting).fetchone() == (False,)
    # Queries run on cursors, which never have it.
    assert database.sql(f"{setting} AS bar").to_pylist() == [{"bar": False}]


def test_empty_codes_make_an_empty_database(tmp_path: Path) -> None:
    with CodeWriter(tmp_path / "codes", 3):
        pass
    with FeatureDB.build(tmp_path / "f.ddb", tmp_path / "codes", decode=str) as db:
        assert (db.d_sae, len(db.top(2))) == (3, 0)
        assert db.feature(2).labels[0].label.startswith("dead")
        assert len(db.search("the")) == 0


def test_saved_examples_serve_as_well(tmp_path: Path, make_world: Callable[..., World]) -> None:
    codes = make_world(15, sequences=2).write(tmp_path / "codes")
    collect_examples(codes, n=2).save(tmp_path / "examples")
    examples = Examples.load(tmp_path / "examples")
    with FeatureDB.build(tmp_path / "f.ddb", codes, examples, per_sequence=None) as db:
        stored = db.sql("SELECT max(rank) AS n, count(*) AS rows FROM examples").to_pylist()[0]
    assert stored == {"n": 2, "rows": int(torch.count_nonzero(examples.strengths))}
