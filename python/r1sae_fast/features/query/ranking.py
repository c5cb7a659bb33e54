"""How well a text answers a few words: BM25 (Robertson & Zaragoza, 2009), with parts of words.

DuckDB's own full-text search is an extension that it downloads, so it can't be had offline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_K1 = 1.2  # how soon further hits of a word count less
_B = 0.75  # how much length counts
_WORD = re.compile(r"\w+")


def words_of(query: str) -> list[str]:
    """The query's parts, in lower case: cut at white space, or all of it where it is only that."""
    return list(dict.fromkeys(query.lower().split())) or [query]


def closeness(part: str, text: str) -> float:
    """How often ``part`` is in ``text`` (both in lower case).

    A whole word counts 1, a piece of a word its share of that word. What is no part of a word
    (``[so]``) counts 1 where it stands.
    """
    if _WORD.fullmatch(part) is None:
        return float(text.count(part))
    found = 0.0
    for word in _WORD.findall(text):
        if part in word:
            found += len(part) / len(word)
    return found


def bm25(parts: Sequence[str], texts: Sequence[str], total: int, mean_length: float) -> list[float]:
    """The score of each text, at least 0; higher is better.

    Args:
        parts: of :func:`words_of`.
        texts: all texts that hold any of the parts, in lower case.
        total: the number of all texts, these and the others.
        mean_length: of all texts, in characters.

    A text with m of n parts gets m / n of the sum, so that those with all come first.
    """
    hits = [[closeness(part, text) for part in parts] for text in texts]
    weights = []
    for at in range(len(parts)):
        holding = sum(row[at] > 0 for row in hits)
        weights.append(math.log1p((total - holding + 0.5) / (holding + 0.5)))
    scores = []
    for text, row in zip(texts, hits, strict=True):
        length = 1 - _B + _B * len(text) / max(mean_length, 1.0)
        score = sum(
            weight * count * (_K1 + 1) / (count + _K1 * length)
            for weight, count in zip(weights, row, strict=True)
        )
        scores.append(score * sum(count > 0 for count in row) / len(parts))
    return scores
