"""Windows of text from a database: to explain a feature by, to test its label, and without it.

A sequence is cut into windows of so many tokens, as delphi does, which never overlap: what tests a
label is never among what it was made from. A test window whose text is that of a shown one (the
same prompt twice) is dropped too, and so is a silent window with the text of an active one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1sae_fast.errors import LabelError
from r1sae_fast.features import FeatureDB
from r1sae_fast.labels.settings import LabelSettings

Place = tuple[int, int]
"""Sequence, and number of the window in it."""

_SPARE = 2  # so many times the windows needed are drawn: some are dropped as repeats
_MOST_LETTERS = 500  # of a token: a file of unknown origin may have megabytes, to be paid for
_RANGES = 64  # in one query


@dataclass(frozen=True)
class Window:
    """Tokens that follow one another, with the feature's strength on each (0: not active)."""

    place: Place
    texts: tuple[str, ...]
    strengths: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The feature's strongest activation here."""
        return max(self.strengths)


@dataclass(frozen=True)
class Sample:
    """A feature's windows; of the active ones by falling quantile."""

    feature: int
    explain: tuple[Window, ...]
    test: tuple[Window, ...]
    negatives: tuple[Window, ...]
    largest: float


class TooFewError(LabelError):
    """A feature has too few windows with it, or without it."""


class Sampler:
    """Draws windows from a database; the same ones for the same seed. For several threads.

    Args:
        db: a database whose tokens have text.
        settings: the sizes.
    """

    def __init__(self, db: FeatureDB, settings: LabelSettings) -> None:
        self._db = db
        self._settings = settings
        self._first = threading.Lock()

    def sample(self, feature: int) -> Sample:
        """The windows of one feature.

        Raises:
            TooFewError: fewer than ``min_windows`` or ``min_negatives``.
            LabelError: tokens without text.
        """
        s = self._settings
        active, quantiles, total = self._active(feature)
        if total < s.min_windows:
            raise TooFewError(
                f"active in {total} windows of {s.context} tokens; {s.min_windows} are needed"
            )
        explain, test = self._split(active, quantiles)
        taken = {window.texts for window in active}
        negatives = self._silent(feature, taken)
        needed = min(s.min_negatives, s.negatives)
        if len(negatives) < needed:
            raise TooFewError(
                f"only {len(negatives)} windows found in which it is not active; {needed} are "
                "needed"
            )
        if not test:
            raise TooFewError("all its windows have the same text: none is left to test by")
        largest = max(window.largest for window in active)
        return Sample(feature, explain, test, negatives, largest)

    # -- with the feature -----------------------------------------------------------------------

    def _active(self, feature: int) -> tuple[list[Window], list[int], int]:
        """Some windows from each quantile, in a random order within it, and how many there are."""
        s = self._settings
        wanted = _SPARE * (s.explain + s.test) // s.quantiles
        rows = self._rows(
            f"""
            WITH windows AS (
                SELECT sequence_id, token_idx // {s.context} AS part, max(strength) AS strength
                FROM activations WHERE feature_id = ? GROUP BY ALL
            ), cut AS (
                SELECT sequence_id, part, count(*) OVER () AS total,
                       ntile({s.quantiles}) OVER (
                           ORDER BY strength DESC, sequence_id, part) AS quantile
                FROM windows
            )
            SELECT sequence_id, part, quantile, total,
                   md5(concat_ws(' ', {s.seed}, ?, sequence_id, part)) AS draw
            FROM cut
            QUALIFY row_number() OVER (PARTITION BY quantile ORDER BY draw) <= {wanted}
            ORDER BY quantile, draw""",
            [feature, feature],
        )
        places = [(row["sequence_id"], row["part"]) for row in rows]
        windows = self._read(places, feature)
        kept: list[Window] = []
        quantiles: list[int] = []
        texts: set[tuple[str, ...]] = set()
        for row, place in zip(rows, places, strict=True):
            window = windows.get(place)
            if window is None or window.texts in texts:
                continue  # activations on tokens that the file does not hold, or a repeat
            texts.add(window.texts)
            kept.append(window)
            quantiles.append(row["quantile"])
        return kept, quantiles, rows[0]["total"] if rows else 0

    def _split(
        self, windows: Sequence[Window], quantiles: Sequence[int]
    ) -> tuple[tuple[Window, ...], tuple[Window, ...]]:
        s = self._settings
        explain: list[Window] = []
        test: list[Window] = []
        show, try_ = s.explain // s.quantiles, s.test // s.quantiles
        for quantile in range(1, s.quantiles + 1):
            here = [w for w, q in zip(windows, quantiles, strict=True) if q == quantile]
            cut = show
            if len(here) < show + try_:  # too few for both: shared out in proportion
                cut = len(here) * show // (show + try_)
                # One of a kind goes where there are fewer so far.
                if len(here) * show % (show + try_) and len(explain) * s.test <= (
                    len(test) * s.explain
                ):
                    cut += 1
            explain += here[:cut]
            test += here[cut : cut + try_]
        return tuple(explain), tuple(test)

    # -- without it -----------------------------------------------------------------------------

    def _silent(self, feature: int, taken: set[tuple[str, ...]]) -> tuple[Window, ...]:
        """Windows drawn at random in which the feature is nowhere active."""
        wanted = self._settings.negatives
        found: list[Window] = []
        texts = set(taken)
        for places in self._draws(feature):
            active = self._where_active(feature, places)
            silent = [place for place in places if place not in active]
            windows = self._read(silent, None)
            for place in silent:
                window = windows.get(place)
                if window is None or window.texts in texts:
                    continue
                texts.add(window.texts)
                found.append(window)
                if len(found) == wanted:
                    return tuple(found)
        return tuple(found)

    def _draws(self, feature: int) -> Iterator[list[Place]]:
        """Places, a batch at a time: each once if they are few, else some at random."""
        s = self._settings
        sequences, first, ends = self._sequences
        total = int(ends[-1]) if len(ends) else 0
        random = np.random.default_rng([s.seed, feature])
        batch = _SPARE * s.negatives
        if total <= 64 * batch:
            numbers = random.permutation(total)
        else:
            numbers = np.unique(random.integers(0, total, 16 * batch))
            random.shuffle(numbers)
        for start in range(0, len(numbers), batch):
            at = numbers[start : start + batch]
            sequence = np.searchsorted(ends, at, side="right")
            part = at - np.where(sequence > 0, ends[sequence - 1], 0) + first[sequence]
            yield list(zip(sequences[sequence].tolist(), part.tolist(), strict=True))

    @property
    def _sequences(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        with self._first:
            return self._all_sequences

    @cached_property
    def _all_sequences(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Of each sequence: its id, the number of its first window, the windows so far."""
        context = self._settings.context
        table = self._db.sql(
            f"SELECT sequence_id, min(token_idx) // {context} AS first, "
            f"max(token_idx) // {context} AS last FROM tokens GROUP BY ALL ORDER BY sequence_id"
        )
        first, last = table["first"].to_numpy(), table["last"].to_numpy()
        return table["sequence_id"].to_numpy(), first, np.cumsum(last - first + 1)

    def _where_active(self, feature: int, places: Sequence[Place]) -> set[Place]:
        sequences = ", ".join(str(int(s)) for s in sorted({place[0] for place in places}))
        rows = self._rows(
            f"SELECT DISTINCT sequence_id, token_idx // {self._settings.context} AS part "
            f"FROM activations WHERE feature_id = ? AND sequence_id IN ({sequences})",
            [feature],
        )
        return {(row["sequence_id"], row["part"]) for row in rows}

    # -- their tokens ---------------------------------------------------------------------------

    def _read(self, places: Sequence[Place], feature: int | None) -> dict[Place, Window]:
        """The tokens of windows, with a feature's strengths or (None) without any."""
        context = self._settings.context
        tokens: dict[Place, list[tuple[int, str]]] = {}
        for start in range(0, len(places), _RANGES):
            ranges = [
                "SELECT sequence_id, token_idx, decoded_token FROM tokens "
                f"WHERE sequence_id = {int(sequence)} "
                f"AND token_idx BETWEEN {part * context} AND {part * context + context - 1}"
                for sequence, part in places[start : start + _RANGES]
            ]
            for row in self._rows(" UNION ALL ".join(ranges)):
                if row["decoded_token"] is None:
                    raise LabelError(
                        f"{self._db.path}: tokens have no text; a language model can't explain "
                        "numbers. Build the database with a tokenizer (--tokenizer)"
                    )
                place = (row["sequence_id"], row["token_idx"] // context)
                tokens.setdefault(place, []).append(
                    (row["token_idx"], row["decoded_token"][:_MOST_LETTERS])
                )
        strengths: dict[Place, float] = {}
        if tokens and feature is not None:
            within = ", ".join(f"({int(sequence)}, {int(part)})" for sequence, part in tokens)
            for row in self._rows(
                "SELECT sequence_id, token_idx, strength FROM activations WHERE feature_id = ? "
                f"AND (sequence_id, token_idx // {context}) IN ({within})",
                [feature],
            ):
                strengths[row["sequence_id"], row["token_idx"]] = row["strength"]
        return {
            place: Window(
                place,
                tuple(text for _, text in sorted(found)),
                tuple(strengths.get((place[0], at), 0.0) for at, _ in sorted(found)),
            )
            for place, found in tokens.items()
        }

    def _rows(self, query: str, parameters: Sequence[object] = ()) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._db.sql(query, parameters).to_pylist()
        return rows
