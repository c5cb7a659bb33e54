"""Small worlds of tokens and codes, written as shards."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1sae_fast.codes import SparseCodes
from r1sae_fast.features import FeatureDB
from r1sae_fast.shards import CodeWriter

SEGMENT_NAMES = {0: "prompt", 1: "thinking", 2: "response", 255: None}


@dataclass(frozen=True)
class World:
    """Rows of dense codes ``[rows, d_sae]`` and what token each row is."""

    dense: NDArray[np.float32]
    tokens: NDArray[np.int32]
    sequence_id: NDArray[np.int64]
    position: NDArray[np.int32]
    segment: NDArray[np.uint8]
    texts: tuple[str, ...]

    def write(self, folder: Path, rows_per_shard: int = 37) -> Path:
        d_sae = self.dense.shape[1]
        with CodeWriter(folder, d_sae, {"sae": "test"}, rows_per_shard=rows_per_shard) as writer:
            writer.write(
                SparseCodes.from_dense(torch.from_numpy(self.dense)),
                tokens=self.tokens,
                sequence_id=self.sequence_id,
                position=self.position,
                segment=self.segment,
            )
        return folder

    def decode(self, token: int) -> str:
        return self.texts[token]

    @property
    def activations(self) -> set[tuple[int, int, int, float]]:
        """Feature, sequence, place, strength."""
        rows, features = np.nonzero(self.dense)
        return {
            (f, int(self.sequence_id[r]), int(self.position[r]), float(self.dense[r, f]))
            for r, f in zip(rows.tolist(), features.tolist(), strict=True)
        }


TEXTS = (" the", " Wait", ".", "\n", " so", " 7", "\x1b[31m", "[red]", "\u202eabc", "％%", "é", "")
FEATURES = 24


def make_world(seed: int, sequences: int = 12, length: int = 40) -> World:
    """Chance, and features that were made to mean something (see the numbers below)."""
    generator = np.random.default_rng(seed)
    rows = sequences * length
    tokens = generator.integers(0, len(TEXTS), rows).astype(np.int32)
    place = np.arange(rows) % length
    dense = np.zeros((rows, FEATURES), dtype=np.float32)
    # 10..: noise, in steps that make ties.
    noise = generator.integers(1, 9, (rows, FEATURES - 10)) / 8
    dense[:, 10:] = noise * (generator.random(noise.shape) < 0.1)
    dense[:, 23] = 0  # dead
    dense[:, 22] = 0  # all but dead
    dense[17, 22] = 0.5
    same = np.arange(rows) // length
    follows = np.concatenate([[False], (tokens[:-1] == 1) & (same[:-1] == same[1:])])
    precedes = np.concatenate([(tokens[1:] == 1) & (same[:-1] == same[1:]), [False]])
    dense[tokens == 1, 1] = generator.uniform(1, 2, (tokens == 1).sum())  # fires on " Wait"
    dense[follows, 2] = 1.5  # after it
    dense[precedes, 3] = 1.5  # before it
    dense[np.isin(tokens, (4, 5)), 4] = 2.0  # on two tokens
    dense[place >= 36, 5] = 1.0  # in the response
    segment = np.select([place < 10, place < 36], [0, 1], 2).astype(np.uint8)
    return World(
        dense, tokens, (same * 3 + 7).astype(np.int64), place.astype(np.int32), segment, TEXTS
    )


@pytest.fixture(scope="session")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="session", name="make_world")
def _make_world() -> Callable[..., World]:
    return make_world


@pytest.fixture(scope="session")
def database(world: World, tmp_path_factory: pytest.TempPathFactory) -> FeatureDB:
    """A database of the world, to be read only."""
    folder = tmp_path_factory.mktemp("features")
    codes = world.write(folder / "codes")
    return FeatureDB.build(
        folder / "features.ddb", codes, decode=world.decode, metadata={"sae": "test", "layer": 3}
    )


@pytest.fixture
def query(database: FeatureDB) -> Callable[[str], list[tuple[object, ...]]]:
    """Rows of a query as tuples."""
    return lambda sql: [tuple(row.values()) for row in database.sql(sql).to_pylist()]
