"""What one pass keeps of each feature, against plain NumPy and SQL; and that nothing else shows."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import DatabaseError
from r1sae_fast.features import FeatureDB, clustering, neighbours
from r1sae_fast.features.schema import NEGATIVE_WINDOW, POSITION_EDGES
from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import CodeShards, CodeWriter

Query = Callable[[str], list[tuple[Any, ...]]]
World = Any  # conftest's

ALL = ("tokens", "activations", "features", "examples", "intervals", "negatives", "coactivations",
       "token_lift", "segments", "positions", "autointerp")  # fmt: skip


def write_dense(folder: Path, dense: NDArray[np.float32], rows_per_shard: int = 50) -> CodeShards:
    rows = len(dense)
    with CodeWriter(folder, dense.shape[1], rows_per_shard=rows_per_shard) as writer:
        writer.write(
            SparseCodes.from_dense(torch.from_numpy(dense)),
            tokens=np.zeros(rows, np.int32),
            sequence_id=np.zeros(rows, np.int64),
            position=np.arange(rows, dtype=np.int32),
        )
    return CodeShards(folder)


# -- places -------------------------------------------------------------------------------------


def test_segments_and_positions_are_counted(world: World, query: Query) -> None:
    assert query("SELECT segment, tokens FROM segments") == [
        *((name, int((world.segment == i).sum())) for i, name in
          enumerate(("prompt", "thinking", "response"))),
        (None, 0),
    ]  # fmt: skip
    found = query("SELECT feature_id, position_counts FROM features ORDER BY feature_id")
    bins = np.searchsorted(POSITION_EDGES, world.position, side="right") - 1
    for feature, counts in found:
        active = world.dense[:, feature] > 0
        assert counts == np.bincount(bins[active], minlength=19).tolist()
    tokens = query("SELECT bin, low, high, tokens FROM positions ORDER BY bin")
    for number, low, high, count in tokens:
        inside = (world.position >= low) & (world.position < (high or 1 << 40))
        assert (count, number) == (inside.sum(), POSITION_EDGES.index(low))


def test_intervals_are_samples_of_equal_parts(world: World, query: Query) -> None:
    activations = query("""
        SELECT * FROM activations ORDER BY feature_id, strength DESC, sequence_id, token_idx""")
    found = query("SELECT * FROM intervals ORDER BY feature_id, quantile, rank")
    for feature in range(world.dense.shape[1]):
        mine = [row[1:] for row in activations if row[0] == feature][::-1]  # the weakest first
        for quantile in range(5):
            part = mine[len(mine) * quantile // 5 : len(mine) * (quantile + 1) // 5]
            drawn = [row for row in found if row[:2] == (feature, quantile)]
            assert [row[2] for row in drawn] == list(range(1, min(5, len(part)) + 1))
            assert len({row[6:8] for row in drawn}) == len(drawn)
            for _, _, _, low, high, count, *place in drawn:
                assert (low, high, count) == (part[0][2], part[-1][2], len(part))
                assert tuple(place) in part


def test_samples_are_even(tmp_path: Path) -> None:
    """Of 40 activations in one interval, each is drawn as often as the others over 400 features."""
    dense = np.full((40, 400), 1.0, dtype=np.float32)
    codes = write_dense(tmp_path / "codes", dense)
    with FeatureDB.build(tmp_path / "f.ddb", codes, quantiles=1, coactivations=0) as db:
        drawn = db.sql("SELECT token_idx FROM intervals").column("token_idx").to_numpy()
    counts = np.bincount(drawn, minlength=40)
    assert counts.sum() == 2000
    # Fixed codes and seed: no chance in it. (39 degrees of freedom: beyond 90 in 1 of 10^5.)
    assert ((counts - 50.0) ** 2 / 50).sum() < 90


def test_negatives_are_far_from_any_activation(world: World, query: Query) -> None:
    activations = query("SELECT feature_id, sequence_id, token_idx FROM activations")
    found = query("SELECT feature_id, rank, sequence_id, token_idx FROM negatives")
    places = set(zip(world.sequence_id.tolist(), world.position.tolist(), strict=True))
    counts = np.zeros(world.dense.shape[1], dtype=int)
    for feature, rank, sequence, at in found:
        assert (sequence, at) in places
        counts[feature] += 1
        assert rank == counts[feature]
        assert not any(
            (other, text) == (feature, sequence) and abs(at - place) <= NEGATIVE_WINDOW
            for other, text, place in activations
        )
    assert len({(row[0], *row[2:]) for row in found}) == len(found)
    assert counts[23] == 0  # dead: there is nothing to tell apart
    assert counts[22] == 50  # active once


# -- pairs --------------------------------------------------------------------------------------


def partners_by_fractions(dense: NDArray[np.float32], n: int) -> list[tuple[int, int, int, int]]:
    active = (dense > 0).astype(np.int64)
    together, counts = active.T @ active, active.sum(axis=0)
    rows = []
    for a in range(dense.shape[1]):
        others = [b for b in range(dense.shape[1])
                  if b != a and together[a, b] >= clustering.LEAST_TOGETHER]  # fmt: skip
        others.sort(key=lambda b: (-Fraction(int(together[a, b]), int(counts[b])),
                                   -together[a, b], b))  # fmt: skip
        rows += [(a, rank, b, int(together[a, b])) for rank, b in enumerate(others[:n], 1)]
    return rows


@pytest.mark.parametrize("d_sae", [1, 63, 123, 200])
@pytest.mark.parametrize("memory", [1 << 12, 1 << 24])
def test_coactivations_are_exact(d_sae: int, memory: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(d_sae)
    density = generator.random(d_sae) ** 2 * 0.3
    dense = (generator.random((411, d_sae)) < density).astype(np.float32)
    dense[100:120] = 0  # rows without codes
    dense[7] = 1  # one with all
    dense[:, ::10] = dense[:, :1]  # ties
    codes = write_dense(tmp_path / "codes", dense)
    shards = clustering.shards_of(codes)
    expected = partners_by_fractions(dense, 20)
    for threads in (1, 3):
        counts = clustering.count(shards, d_sae, threads)
        assert counts.tolist() == (dense > 0).sum(axis=0).tolist()
        found = clustering.partners(shards, counts, 20, memory, threads)
        rows = list(zip(*(found[c].tolist() for c in ("feature_id", "rank", "other_id", "count")),
                        strict=True))  # fmt: skip
        assert rows == expected
    a, b = found["feature_id"], found["other_id"]
    pmi = np.log2(found["count"] * 411 / counts[a].astype(float) / counts[b])
    assert np.allclose(found["pmi"], pmi, rtol=1e-12, atol=1e-12)


def test_pairs_that_meet_more_often_than_16_bits_hold(tmp_path: Path) -> None:
    rows = 150_000
    codes = SparseCodes(
        torch.ones(2 * rows), torch.tensor([1, 2], dtype=torch.int32).repeat(rows),
        torch.arange(0, 2 * rows + 1, 2), 4,
    )  # fmt: skip
    with CodeWriter(tmp_path / "codes", 4, rows_per_shard=40_000) as writer:
        writer.write(codes)
    shards = clustering.shards_of(CodeShards(tmp_path / "codes"))
    counts = clustering.count(shards, 4, 2)
    found = clustering.partners(shards, counts, 20, 1 << 24, 2)
    assert found["count"].tolist() == [rows, rows]
    assert found["other_id"].tolist() == [2, 1]


# -- nothing else shows -------------------------------------------------------------------------


def tables(path: Path, codes: Path, world: World, **options: Any) -> dict[str, list[Any]]:
    with FeatureDB.build(path, codes, decode=world.decode, **options) as db:
        return {name: db.sql(f"SELECT * FROM {name} ORDER BY ALL").to_pylist() for name in ALL}


def test_threads_shards_buckets_and_the_order_of_rows_do_not_show(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tables(tmp_path / "a.ddb", world.write(tmp_path / "a"), world, threads=1)
    # A bucket for each feature or few, tables of pairs for some features at a time.
    monkeypatch.setattr(clustering, "_BUCKET_BYTES", 1 << 19)
    monkeypatch.setattr(clustering, "_GROUP_ROWS", 50)
    tiles = _core.pair_tiles
    monkeypatch.setattr(_core, "pair_tiles", lambda d_sae, _: tiles(d_sae, 64))
    made = tables(tmp_path / "b.ddb", world.write(tmp_path / "b", 11), world, threads=3)
    assert made == expected
    order = np.random.default_rng(1).permutation(len(world.tokens))
    columns = ("dense", "tokens", "sequence_id", "position", "segment")
    shuffled = replace(world, **{name: getattr(world, name)[order] for name in columns})
    made = tables(tmp_path / "c.ddb", shuffled.write(tmp_path / "c"), world, threads=2)
    assert made == expected


def test_more_examples_of_a_sequence_on_request(
    tmp_path: Path, world: World, database: FeatureDB
) -> None:
    codes = world.write(tmp_path / "codes")
    with FeatureDB.build(tmp_path / "f.ddb", codes, per_sequence=None, n=7) as db:
        found = db.sql("SELECT * FROM examples ORDER BY feature_id, rank").to_pylist()
        expected = db.sql("""
            SELECT feature_id, row_number() OVER w AS rank, sequence_id, token_idx, strength
            FROM activations
            WINDOW w AS (PARTITION BY feature_id ORDER BY strength DESC, sequence_id, token_idx)
            QUALIFY rank <= 7 ORDER BY feature_id, rank""").to_pylist()
        assert found == expected
    most = (
        "SELECT max(n) AS n FROM "
        "(SELECT count(*) AS n FROM examples GROUP BY feature_id, sequence_id)"
    )
    assert database.sql(most).to_pylist() == [{"n": 1}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "examples is 0; expected at least 1"),
        ({"negatives": -1}, "negatives is -1; expected at least 0"),
        ({"max_memory": 1000}, "max_memory is 1000; expected at least"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, int], message: str, tmp_path: Path, world: World
) -> None:
    codes = world.write(tmp_path / "codes")
    with pytest.raises(ValueError, match=message):
        FeatureDB.build(tmp_path / "f.ddb", codes, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["codes"]


# -- the SAE ------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_directions(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    d_sae = world.dense.shape[1]
    sae = FastSAE(d_in=5, d_sae=d_sae, k=3)
    directions = torch.from_numpy(np.random.default_rng(2).integers(-1, 2, (d_sae, 5)))
    directions[3] = 0
    sae.W_dec.data.copy_(directions)
    monkeypatch.setattr(neighbours, "_CELLS", 5 * d_sae)
    codes = world.write(tmp_path / "codes")
    with FeatureDB.build(tmp_path / "f.ddb", codes, sae=sae, neighbours=6) as db:
        found = db.sql("SELECT * FROM neighbours ORDER BY feature_id, rank").to_pylist()
        checksum = db.metadata["sae_checksum"]
    assert len(checksum) == 64
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    cosine = (unit @ unit.T).numpy()
    for feature in range(d_sae):
        mine = [row for row in found if row["feature_id"] == feature]
        assert [row["rank"] for row in mine] == list(range(1, 7))
        assert feature not in {row["other_id"] for row in mine}
        assert len({row["other_id"] for row in mine}) == 6
        largest = np.sort(np.delete(cosine[feature], feature))[::-1][:6]
        # Products of 5 float32 terms of at most 1.
        assert np.allclose([row["cosine"] for row in mine], largest, atol=1e-6)
        for row in mine:
            assert abs(cosine[feature, row["other_id"]] - row["cosine"]) < 1e-6
    other = FastSAE(d_in=5, d_sae=7, k=3)
    with pytest.raises(DatabaseError, match="the SAE has 7 features, the codes 24"):
        FeatureDB.build(tmp_path / "g.ddb", codes, sae=other)
