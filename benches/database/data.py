"""Codes of R1's shape, as shards and as a database in the released layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import torch

from r1sae_fast.codes import SparseCodes
from r1sae_fast.features.stream import ArrowStream
from r1sae_fast.shards import CodeShards, CodeWriter

SEQUENCE = 1024
VOCABULARY = 129_280
_ROWS = 1 << 16


def write_codes(folder: Path, rows: int, d_sae: int, k: int) -> CodeShards:
    """Frequent and rare features, float32 strengths of a long tail, texts of 1,024 tokens."""
    generator = np.random.default_rng(0)
    with CodeWriter(folder, d_sae) as writer:
        for start in range(0, rows, _ROWS):
            size = min(_ROWS, rows - start)
            rank = (generator.random((size, k), np.float32) ** 2 * (d_sae // k)).astype(np.int32)
            indices = rank * k + np.arange(k, dtype=np.int32)
            values = generator.standard_exponential((size, k), np.float32) / 2 + 0.01
            # No two equal in a row: ties would have to go by feature.
            values = -np.sort(-values, axis=1) - np.arange(k, dtype=np.float32) * 1e-6
            row = np.arange(start, start + size)
            position = row % SEQUENCE
            segment = np.select([position < 128, position < 768], [0, 1], 2)
            token = (generator.random(size) ** 4 * VOCABULARY).astype(np.int32)
            writer.write(
                SparseCodes(
                    torch.from_numpy(values.ravel()),
                    torch.from_numpy(indices.ravel()),
                    torch.arange(0, size * k + 1, k),
                    d_sae,
                ),
                tokens=token,
                sequence_id=row // SEQUENCE,
                position=position,
                segment=segment,
            )
    return CodeShards(folder)


def write_released(path: Path, codes: CodeShards) -> None:
    """The same rows in the released tables and order: that of the text."""
    with duckdb.connect(str(path)) as connection:
        connection.execute("SET threads = 1")
        connection.execute(
            "CREATE TABLE tokens (sequence_id BIGINT, token_idx INTEGER, token INTEGER, "
            "decoded_token VARCHAR)"
        )
        connection.execute(
            "CREATE TABLE activations (feature_id INTEGER, sequence_id BIGINT, "
            "token_idx INTEGER, strength FLOAT)"
        )
        places = {"sequence_id": pa.int64(), "token_idx": pa.int32(), "token": pa.int32(),
                  "decoded_token": pa.string()}  # fmt: skip
        active = {"feature_id": pa.int32(), "sequence_id": pa.int64(), "token_idx": pa.int32(),
                  "strength": pa.float32()}  # fmt: skip
        with ArrowStream(connection, places, _tokens(codes)) as name:
            connection.execute(f"INSERT INTO tokens SELECT * FROM {name}")
        with ArrowStream(connection, active, activation_batches(codes)) as name:
            connection.execute(f"INSERT INTO activations SELECT * FROM {name}")
        connection.execute("CHECKPOINT")


def _tokens(codes: CodeShards) -> Iterator[list[pa.Array]]:
    for batch in codes.iter_batches(_ROWS):
        token = batch.tokens.numpy()
        text = pa.array([f" {number}" for number in token.tolist()], pa.string())
        yield [pa.array(batch.sequence_id.numpy()), pa.array(batch.position.numpy()),
               pa.array(token), text]  # fmt: skip


def activation_batches(codes: CodeShards) -> Iterator[list[pa.Array]]:
    """Columns of the table ``activations``, in the order of the text."""
    for batch in codes.iter_batches(_ROWS):
        row = batch.codes.row_ids.numpy()
        yield [
            pa.array(batch.codes.indices.numpy()),
            pa.array(batch.sequence_id.numpy()[row]),
            pa.array(batch.position.numpy()[row]),
            pa.array(batch.codes.values.numpy()),
        ]
