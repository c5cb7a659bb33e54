"""Examples of many features with the tokens around them, in columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from r1sae_fast.features.arrays import numbers
from r1sae_fast.features.exporting.encoding import encoded
from r1sae_fast.features.labelled import Columns
from r1sae_fast.features.text import harmless

Table = Callable[[str], pa.Table]

TOP = -1
"""The interval's number of the strongest examples."""
_NONE = -(1 << 31)  # of a token without id


@dataclass(frozen=True)
class Context:
    """An example with the tokens around it: texts, ids and strengths side by side.

    ``interval``: TOP, or the number of the interval that it was drawn from, with its ``low``,
    ``high`` and ``share`` of the activations. ``token_idx``: the example's place in its sequence,
    ``peak``: which of the tokens it is.
    """

    interval: int
    low: float
    high: float
    share: float
    sequence_id: int
    token_idx: int
    peak: int
    tokens: tuple[int | None, ...]
    texts: tuple[str, ...]
    strengths: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Windows:
    """Examples ``[n]``, by feature, and what is around them ``[n, 2 * window + 1]``.

    ``codes``: which of ``texts``, or -1 where the text has no token; ``bins`` ``[n, 3]``: low, high
    and share.
    """

    feature: NDArray[np.int32]
    interval: NDArray[np.int32]
    bins: NDArray[np.float64]
    sequence_id: NDArray[np.int64]
    token_idx: NDArray[np.int32]
    codes: NDArray[np.int32]
    tokens: NDArray[np.int32]
    strengths: NDArray[np.float64]
    texts: tuple[str, ...]

    @cached_property
    def codes_json(self) -> list[str]:
        """The texts as JSON, harmless within a page's script too."""
        return [encoded(text).decode("ascii") for text in self.texts]

    def context(self, number: int) -> Context:
        """One of them."""
        present = self.codes[number] >= 0
        low, high, share = self.bins[number].tolist()
        return Context(
            int(self.interval[number]),
            low,
            high,
            share,
            int(self.sequence_id[number]),
            int(self.token_idx[number]),
            int(present[: len(present) // 2].sum()),
            tuple(None if t == _NONE else t for t in self.tokens[number][present].tolist()),
            tuple(self.texts[code] for code in self.codes[number][present].tolist()),
            tuple(self.strengths[number][present].tolist()),
        )


@dataclass(frozen=True)
class Contexts:
    """One feature's part of ``windows``: numbers ``start`` to ``end``."""

    windows: Windows
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, number: int) -> Context:
        return self.windows.context(range(self.start, self.end)[number])

    def __iter__(self) -> Iterator[Context]:
        return map(self.windows.context, range(self.start, self.end))


def contexts_of(
    table: Table, tables: Columns, features: Sequence[int], n: int, window: int
) -> list[Contexts]:
    """Those of each of the features: the ``n`` strongest, then samples of each interval."""
    found = _read(table, tables, _chosen(features), n, window)
    starts = np.searchsorted(found.feature, features, side="left").tolist()
    ends = np.searchsorted(found.feature, features, side="right").tolist()
    return [Contexts(found, start, end) for start, end in zip(starts, ends, strict=True)]


def _chosen(features: Sequence[int]) -> str:
    first, last = min(features), max(features)
    if len(set(features)) == last - first + 1:
        return f"feature_id BETWEEN {first} AND {last}"
    return f"feature_id IN ({', '.join(map(str, features))})"


def _places(tables: Columns, chosen: str, n: int) -> str:
    top = (
        f"SELECT feature_id, rank, sequence_id, token_idx, strength FROM examples WHERE {chosen}"
        if "examples" in tables
        else f"""SELECT feature_id, row_number() OVER (PARTITION BY feature_id
                ORDER BY strength DESC, sequence_id, token_idx) AS rank,
            sequence_id, token_idx, strength FROM activations WHERE {chosen}"""
    )
    parts = [
        f"""SELECT feature_id, {TOP} AS number, rank, sequence_id, token_idx,
            0.0 AS low, strength AS high, 0 AS count FROM ({top}) WHERE rank <= {n}"""
    ]
    if "intervals" in tables:
        parts.append(
            f"""SELECT feature_id, quantile, rank, sequence_id, token_idx, low, high, count
                FROM intervals WHERE {chosen} AND isfinite(low + high)
                    AND quantile + rank + count IS NOT NULL"""
        )
    return f"""places AS (
        SELECT feature_id::INTEGER AS feature_id, number::INTEGER AS number,
            sequence_id::BIGINT AS sequence_id, token_idx::INTEGER AS token_idx,
            low::DOUBLE AS low, high::DOUBLE AS high, count::BIGINT AS count,
            (row_number() OVER (ORDER BY feature_id, number, rank) - 1)::INTEGER AS place
        FROM ({" UNION ALL ".join(parts)})
        WHERE sequence_id IS NOT NULL AND token_idx IS NOT NULL)"""


def _read(table: Table, tables: Columns, chosen: str, n: int, window: int) -> Windows:
    places = _places(tables, chosen, n)
    examples = table(
        f"""WITH {places}, counts AS (
            SELECT feature_id, count(*) AS total FROM activations WHERE {chosen} GROUP BY ALL)
        SELECT p.feature_id, number, sequence_id, token_idx, low, coalesce(high, 0) AS high,
            coalesce(count / total, 0)::DOUBLE AS share
        FROM places p LEFT JOIN counts c ON c.feature_id = p.feature_id ORDER BY place"""
    )
    # Joins by place, not by range: DuckDB then reads each table once for all.
    around = table(
        f"""WITH {places}, spots AS (
            SELECT place, sequence_id, shift, token_idx + shift AS spot FROM (
                SELECT *, unnest(range(-{window}, {window} + 1))::INTEGER AS shift FROM places))
        SELECT s.place, s.shift, coalesce(t.token, {_NONE})::INTEGER AS token,
            coalesce(t.decoded_token, '[' || t.token || ']', '[None]') AS text
        FROM spots s JOIN tokens t ON t.sequence_id = s.sequence_id AND t.token_idx = s.spot"""
    )
    active = table(
        f"""WITH {places}
        SELECT p.place, (a.token_idx - p.token_idx)::INTEGER AS shift,
            coalesce(a.strength, 0)::DOUBLE AS strength
        FROM places p JOIN (SELECT * FROM activations WHERE {chosen}) a
        ON a.feature_id = p.feature_id AND a.sequence_id = p.sequence_id
        WHERE abs(a.token_idx::BIGINT - p.token_idx) <= {window}"""
    )
    column: dict[str, NDArray[Any]] = {
        name: numbers(examples[name]) for name in examples.column_names
    }
    shape = examples.num_rows, 2 * window + 1
    text = around["text"].combine_chunks().dictionary_encode()
    at = numbers(around["place"]), numbers(around["shift"]) + window
    codes = np.full(shape, -1, dtype=np.int32)
    codes[at] = numbers(text.indices)
    ids = np.full(shape, -1, dtype=np.int32)
    ids[at] = numbers(around["token"])
    strengths = np.zeros(shape)
    strengths[numbers(active["place"]), numbers(active["shift"]) + window] = numbers(
        active["strength"]
    )
    there = codes[:, window] >= 0  # or the file has no such token
    return Windows(
        column["feature_id"][there],
        column["number"][there],
        np.stack([column["low"], column["high"], column["share"]], axis=1)[there],
        column["sequence_id"][there],
        column["token_idx"][there],
        codes[there],
        ids[there],
        strengths[there],
        tuple(map(harmless, text.dictionary.to_pylist())),
    )
