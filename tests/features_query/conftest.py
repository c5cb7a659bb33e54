"""A small database with labels, to be read only."""

from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from r1sae_fast.codes import SparseCodes
from r1sae_fast.features import FeatureDB
from r1sae_fast.shards import CodeWriter

TEXTS = (" the", " Wait", ".", " so", "\x1b[31m", "<b>")
FEATURES = 12
LABELS = [
    (0, "the model waits for a proof", "judge-a", "v1"),
    (1, "Wait: the start of a doubt", "judge-a", "v1"),
    (2, "a proof by contradiction, in detail, with every step of it written out", "judge-a", "v1"),
    (3, "proof", "judge-b", "v1"),
    (3, "something else", "judge-a", "v1"),
    (4, "\x1b[2Jclear <script>alert(1)</script>", "judge-a", "v1"),
]
SCORES = [  # of 20 windows with the feature and 20 without, so many were judged rightly
    (3, "judge-a", "v1", "detection", 11),
    (3, "judge-b", "v1", "detection", 19),
    (3, "judge-b", "v1", "fuzzing", 16),
]


def build(folder: Path) -> FeatureDB:
    generator = np.random.default_rng(3)
    rows = 400
    tokens = generator.integers(0, len(TEXTS), rows)
    dense = np.zeros((rows, FEATURES), dtype=np.float32)
    dense[:, 2:] = generator.integers(1, 9, (rows, FEATURES - 2)) / 8
    dense[:, 2:] *= generator.random((rows, FEATURES - 2)) < 0.1
    dense[tokens == 1, 1] = 1.5  # fires on " Wait"
    dense[:, 11] = 0  # dead
    with CodeWriter(folder / "codes", FEATURES) as writer:
        writer.write(
            SparseCodes.from_dense(torch.from_numpy(dense)),
            tokens=tokens.astype(np.int32),
            sequence_id=np.arange(rows) // 40,
            position=(np.arange(rows) % 40).astype(np.int32),
            segment=(np.arange(rows) % 40 > 15).astype(np.uint8),
        )
    path = folder / "features.ddb"
    FeatureDB.build(path, folder / "codes", decode=TEXTS.__getitem__, progress=False).close()
    with duckdb.connect(str(path)) as connection:
        connection.executemany(
            "INSERT INTO autointerp (feature_id, label, model_name, prompt_version) "
            "VALUES (?, ?, ?, ?)",
            LABELS,
        )
        connection.executemany(
            "INSERT INTO scores (feature_id, model_name, prompt_version, scorer, judge, "
            "balanced_accuracy, true_positives, false_negatives, true_negatives, "
            "false_positives, unanswered) VALUES (?, ?, ?, ?, 'j', ?, ?, ?, ?, ?, 0)",
            [(*row[:4], row[4] / 20, *(row[4], 20 - row[4]) * 2) for row in SCORES],
        )
    return FeatureDB(path)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> FeatureDB:
    return build(tmp_path_factory.mktemp("query"))
