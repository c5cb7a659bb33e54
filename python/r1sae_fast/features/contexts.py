"""The tokens around the places where a feature is active."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from r1sae_fast.features.results import ContextToken

Fetch = Callable[..., list[tuple[Any, ...]]]
Place = tuple[int, int]
"""Sequence and place within it."""

_RANGES = 64  # in one query


def contexts(
    fetch: Fetch, feature: int, places: Sequence[Place], window: int, *, with_segment: bool
) -> dict[Place, tuple[ContextToken, ...]]:
    """The tokens within ``window`` of each place, with the feature's strength on each.

    ``fetch(query, parameters)`` runs a query; ``with_segment`` says whether ``tokens`` has that
    column.
    """
    if not places:
        return {}
    segment = "segment" if with_segment else "NULL"
    # One range a place: the table is sorted, so each reads one block of it.
    ranges = [
        f"SELECT {at}, token_idx, token, decoded_token, {segment}, sequence_id FROM tokens "
        f"WHERE sequence_id = {int(sequence)} "
        f"AND token_idx BETWEEN {int(place) - window} AND {int(place) + window}"
        for at, (sequence, place) in enumerate(places)
    ]
    tokens: list[tuple[Any, ...]] = []
    for start in range(0, len(ranges), _RANGES):
        tokens += fetch(" UNION ALL ".join(ranges[start : start + _RANGES]))
    sequences = ", ".join(str(int(s)) for s in sorted({sequence for sequence, _ in places}))
    strengths = {
        (sequence, place): strength
        for sequence, place, strength in fetch(
            "SELECT sequence_id, token_idx, strength FROM activations "
            f"WHERE feature_id = ? AND sequence_id IN ({sequences}) AND isfinite(strength)",
            [feature],
        )
    }
    found: dict[Place, list[ContextToken]] = {place: [] for place in places}
    for at, place, token, text, part, sequence in sorted(tokens, key=lambda row: row[:2]):
        strength = strengths.get((sequence, place), 0.0)
        found[places[at]].append(ContextToken(place, token, text, strength, part))
    return {place: tuple(context) for place, context in found.items()}
