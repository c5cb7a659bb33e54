"""Statistical labels: on which tokens a feature fires, counted and not interpreted.

For each feature and each of three offsets (the token it fires on, the one before, the one after)
tokens are compared by how much more frequent they are where the feature is active:

    share = P(token | fires)    base = P(token)    lift = share / base

To choose tokens, each activation counts by its strength, and ``SHRINKAGE`` imagined activations on
tokens drawn at random are added, so that three lucky hits on a rare token do not win by their
enormous lift; of the shrunk share p a token's score is its part of the Kullback-Leibler
divergence, p log2(p / base), in bits. The numbers in the label are the plain counted ones.

With many features, tokens and offsets some pairs stand out by chance. A label names only tokens
that are beyond it: the chance of as many hits on a token, at its base rate, is bounded by
2^-evidence (Chernoff's bound for the binomial distribution), and the evidence must exceed
log2(number of comparisons / 1%): in a database of noise, one label in all is wrong once in a
hundred. (Hits are taken as independent, which those in one text are not quite.)
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa

from r1sae_fast.features.arrays import array, numbers, strings
from r1sae_fast.features.execute import execute, interruptible
from r1sae_fast.features.schema import SEGMENTS
from r1sae_fast.features.stream import ArrowStream, arrow_table
from r1sae_fast.features.text import quoted

MODEL_NAME = "statistics"
"""``autointerp.model_name`` of these labels."""
PROMPT_VERSION = "token-lift-1"
"""``autointerp.prompt_version`` of these labels: the name of the method."""

SHRINKAGE = 4.0  # as in the core, which counts tokens (rust/core/src/clusters/tokens.rs)
_NAMED_TOKENS = 3  # at most so many in a label
_MIN_COUNT = 5  # with fewer activations a label would be chance
_MIN_SHARE = 0.1  # (weighted) of a token, to be named after the first
_TELLING_WEIGHT = 0.1  # by so much must the weighted share exceed the counted one to be told
_MIN_LIFT = 2.0  # of any named token
_CHANCE = 0.01  # that any label of a database of noise names a token
_MIN_CLARITY = 0.1  # less than this explained beyond chance: no token stands out
NEIGHBOUR_FACTOR = 1.2
"""The token itself is the plainer statement: its neighbours must explain this much more."""
VERBS = {0: "fires on", -1: "fires after", 1: "fires before"}
"""How a label says where its tokens are, by token_offset."""
_SEGMENT_SHARE = 0.8
_SEGMENT_LIFT = 1.5


@dataclass(frozen=True)
class TokenLift:
    """A row of ``token_lift`` for the label's purposes."""

    offset: int
    token: int
    text: str | None
    count: int
    share: float
    weighted_share: float
    base: float
    lift: float

    @property
    def evidence(self) -> float:
        """Bits against as many hits by chance: n times the divergence of share from base."""
        share, base = self.share, self.base
        misses = (1 - share) * math.log2((1 - share) / (1 - base)) if share < 1 else 0.0
        return self.count / share * (share * math.log2(share / base) + misses)


@dataclass(frozen=True)
class Statistics:
    """What a label is made from.

    ``comparisons``: how many features, tokens and offsets were looked at in all; ``segments``:
    name, share of activations, lift.
    """

    count: int
    rows: int
    comparisons: int
    tokens: tuple[TokenLift, ...]
    segments: tuple[tuple[str, float, float], ...]


def add_labels(
    connection: duckdb.DuckDBPyConnection,
    rows: int,
    d_sae: int,
    vocabulary: int,
    *,
    clarity_only: bool = False,
) -> None:
    """From ``token_lift``: the statistical part of ``autointerp``, and ``features.clarity``.

    ``vocabulary``: how many tokens there are that differ. (The table of tokens is not there yet.)
    ``clarity_only``: ``autointerp`` stays as it is.
    """
    with _no_collection():
        labels = list(_labels(connection, rows, d_sae, vocabulary))
    schema = {"feature_id": pa.int32(), "label": pa.string(), "clarity": pa.float64()}
    features, words, clarities = zip(*labels, strict=True) if labels else ((), (), ())
    columns = [
        array(np.array(features, dtype=np.int32)),
        strings(words),
        array(np.array(clarities, dtype=np.float64)),
    ]
    with ArrowStream(connection, schema, iter([columns])) as name:
        execute(connection, f"CREATE TEMP TABLE labels AS SELECT * FROM {name}")
    if not clarity_only:
        execute(connection, "DELETE FROM autointerp WHERE model_name = ?", [MODEL_NAME])
        execute(
            connection,
            "INSERT INTO autointerp "
            "SELECT feature_id, label, NULL, NULL, ?, ? FROM labels ORDER BY feature_id",
            [MODEL_NAME, PROMPT_VERSION],
        )
    execute(
        connection,
        "UPDATE features SET clarity = labels.clarity FROM labels "
        "WHERE labels.feature_id = features.feature_id",
    )
    execute(connection, "DROP TABLE labels")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python looks for cycles after so many new objects, through all that torch made too: it takes
    longer than these, which have none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def label_of(statistics: Statistics) -> tuple[str, float]:
    """The label and its clarity: the share of its strength explained beyond chance, 0 to 1."""
    count = statistics.count
    if count == 0:
        return f"dead: never active in these {statistics.rows:,} tokens", 0.0
    if count < _MIN_COUNT:
        seen = [quoted(t.text, t.token) for t in statistics.tokens if t.offset == 0]
        times = "once" if count == 1 else f"{count} times"
        return f"active only {times}, too few for statistics" + _listed(": on ", seen), 0.0
    candidates = {
        offset: _named(
            [t for t in statistics.tokens if t.offset == offset],
            _evidence_wanted(statistics.comparisons),
        )
        for offset in VERBS
    }
    clarities = {
        offset: _clarity(named, count) / (1.0 if offset == 0 else NEIGHBOUR_FACTOR)
        for offset, named in candidates.items()
    }
    best = max(VERBS, key=lambda offset: clarities[offset])
    named = candidates[best]
    clarity = _clarity(named, count)
    where = _segment_phrase(statistics.segments)
    if clarity < _MIN_CLARITY:
        return "no token stands out" + where, clarity
    share = sum(token.share for token in named)
    lift = share / sum(token.base for token in named)
    words = _listed(f"{VERBS[best]} ", [quoted(t.text, t.token) for t in named])
    numbers = f"lift {_times(lift)}, {share:.0%} of activations"
    weighted = sum(token.weighted_share for token in named)
    if weighted >= share + _TELLING_WEIGHT:
        numbers += f", {weighted:.0%} of strength"
    return f"{words} ({numbers}){where}", clarity


def _named(tokens: list[TokenLift], evidence: float) -> list[TokenLift]:
    """The tokens that the label names: the best, and others that matter."""
    ranked = [t for t in tokens if t.lift >= _MIN_LIFT and t.evidence >= evidence]
    return ranked[:1] + [t for t in ranked[1:_NAMED_TOKENS] if t.weighted_share >= _MIN_SHARE]


def _clarity(named: list[TokenLift], count: int) -> float:
    share = sum(token.weighted_share for token in named)
    base = sum(token.base for token in named)
    return max(0.0, (share - base) * count / (count + SHRINKAGE))


def _listed(prefix: str, words: list[str]) -> str:
    if not words:
        return ""
    *first, last = words
    return prefix + (f"{', '.join(first)} or {last}" if first else last)


def _times(lift: float) -> str:
    return f"{lift:,.0f}×" if lift >= 10 else f"{lift:.1f}×"


def _segment_phrase(segments: tuple[tuple[str, float, float], ...]) -> str:
    for name, share, lift in segments:
        if share >= _SEGMENT_SHARE and lift >= _SEGMENT_LIFT:
            return f"; {share:.0%} in the {name} (lift {_times(lift)})"
    return ""


def _labels(
    connection: duckdb.DuckDBPyConnection, rows: int, d_sae: int, vocabulary: int
) -> Iterator[tuple[int, str, float]]:
    features = execute(
        connection,
        """
        SELECT f.feature_id, f.count, f.density, f.density_prompt, f.density_thinking,
               f.density_response
        FROM features f ORDER BY f.feature_id""",
    )
    comparisons = d_sae * vocabulary * len(VERBS)
    in_segment = dict(execute(connection, "SELECT segment, tokens FROM segments"))
    tokens = _told(connection, {row[0] for row in features if row[1] < _MIN_COUNT}, comparisons)
    for feature, count, density, *densities in features:
        segments = tuple(
            (name, of_segment * in_segment.get(name, 0) / count, of_segment / density)
            for name, of_segment in zip(SEGMENTS.values(), densities, strict=True)
            if of_segment
        )
        yield (
            feature,
            *label_of(Statistics(count, rows, comparisons, tokens.get(feature, ()), segments)),
        )


def _told(
    connection: duckdb.DuckDBPyConnection, rare: set[int], comparisons: int
) -> dict[int, tuple[TokenLift, ...]]:
    """By feature the tokens that a label could name: few of all, so they are chosen in columns.

    ``rare``: the features that are active too few times for statistics.
    """
    query = f"""
        SELECT feature_id, token_offset, token, coalesce(decoded_token, '') AS text,
               (decoded_token IS NOT NULL)::INTEGER AS known, count, share, weighted_share, base,
               lift
        FROM token_lift WHERE rank <= {_NAMED_TOKENS}
        ORDER BY feature_id, token_offset, rank"""
    table = interruptible(connection, lambda: arrow_table(connection, query, ()))
    if table is None or not table.num_rows:
        return {}
    words = table["text"].combine_chunks().dictionary_encode()
    codes, known = numbers(words.indices), numbers(table["known"])
    names = ("feature_id", "token_offset", "token", "count", "share", "weighted_share", "base",
             "lift")  # fmt: skip
    column = {name: numbers(table[name]) for name in names}
    share, base = column["share"], column["base"]
    with np.errstate(divide="ignore", invalid="ignore"):
        misses = np.where(share < 1, (1 - share) * np.log2((1 - share) / (1 - base)), 0.0)
        evidence = column["count"] / share * (share * np.log2(share / base) + misses)
    # label_of looks again, and more closely.
    enough = evidence >= _evidence_wanted(comparisons) * (1 - 1e-9)
    seen = np.isin(column["feature_id"], list(rare)) & (column["token_offset"] == 0)
    chosen = np.flatnonzero((enough & (column["lift"] >= _MIN_LIFT)) | seen)
    features, offsets, ids, *others = (column[name][chosen].tolist() for name in names)
    texts = words.dictionary.to_pylist()
    shown = [texts[codes[at]] if known[at] else None for at in chosen.tolist()]
    found: dict[int, list[TokenLift]] = {}
    for feature, *row in zip(features, offsets, ids, shown, *others, strict=True):
        found.setdefault(feature, []).append(TokenLift(*row))
    return {feature: tuple(tokens) for feature, tokens in found.items()}


def _evidence_wanted(comparisons: int) -> float:
    return math.log2(max(comparisons, 1) / _CHANCE)
