"""Statistical labels: what they say, and when they keep silent."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.features.labels import Statistics, TokenLift, label_of

WAIT, SO, SEVEN = (1, " Wait"), (2, " so"), (3, " 7")


def lift(
    token: tuple[int, str | None], share: float, base: float, count: int = 1000, **more: Any
) -> TokenLift:
    """``token`` on ``share`` of ``count`` activations."""
    number, text = token
    more = {"offset": 0, "weighted_share": share, **more}
    hits = round(share * count)
    return TokenLift(
        token=number, text=text, count=hits, share=share, base=base, lift=share / base, **more
    )


def label(*tokens: TokenLift, count: int = 1000, **more: Any) -> str:
    values: dict[str, Any] = {"rows": 50_000, "comparisons": 10**6, "segments": (), **more}
    return label_of(Statistics(count=count, tokens=tokens, **values))[0]


def test_one_token() -> None:
    assert label(lift(WAIT, 0.93, 0.93 / 41)) == 'fires on " Wait" (lift 41×, 93% of activations)'


def test_small_and_large_lifts_read_well() -> None:
    assert "(lift 2.5×, " in label(lift(WAIT, 0.5, 0.2))
    assert "(lift 9,300×, " in label(lift(WAIT, 0.93, 0.0001))


def test_strength_is_told_where_it_differs_from_the_count() -> None:
    assert label(lift(WAIT, 0.6, 0.01, weighted_share=0.9)) == (
        'fires on " Wait" (lift 60×, 60% of activations, 90% of strength)'
    )


def test_several_tokens() -> None:
    tokens = (lift(SO, 0.4, 0.02), lift(WAIT, 0.3, 0.02), lift(SEVEN, 0.2, 0.02))
    assert label(*tokens) == ('fires on " so", " Wait" or " 7" (lift 15×, 90% of activations)')
    assert label(*tokens[:2]) == 'fires on " so" or " Wait" (lift 18×, 70% of activations)'


def test_a_second_token_must_matter() -> None:
    assert '" Wait" (' in label(lift(WAIT, 0.8, 0.01), lift(SO, 0.05, 0.001))
    assert '" Wait" (' in label(lift(WAIT, 0.8, 0.01), lift(SO, 0.15, 0.1))


def test_neighbours_must_explain_clearly_more() -> None:
    here = lift(SO, 0.8, 0.02)
    assert label(here, lift(WAIT, 0.9, 0.02, offset=-1)).startswith('fires on " so"')
    before = lift(WAIT, 1.0, 0.02, offset=1)
    assert label(here, before) == 'fires before " Wait" (lift 50×, 100% of activations)'
    assert label(lift(WAIT, 1.0, 0.02, offset=-1)).startswith('fires after " Wait"')


def test_segments() -> None:
    assert label(segments=(("thinking", 0.97, 1.2),)) == "no token stands out"
    assert label(segments=(("prompt", 0.1, 0.2), ("response", 0.97, 3.25))) == (
        "no token stands out; 97% in the response (lift 3.2×)"
    )


def test_dead_and_rare() -> None:
    assert label(count=0) == "dead: never active in these 50,000 tokens"
    few = [lift(WAIT, 0.5, 0.01, count=2), lift(SO, 0.5, 0.01, count=2)]
    assert label(*few, count=2) == (
        'active only 2 times, too few for statistics: on " Wait" or " so"'
    )
    assert label(lift(WAIT, 1.0, 0.01, count=1), count=1) == (
        'active only once, too few for statistics: on " Wait"'
    )


def test_control_characters_and_unknown_text() -> None:
    assert label(lift((5, "\x1b[2J\n"), 0.9, 0.01)).startswith('fires on "␛[2J↵" (')
    assert label(lift((5, None), 0.9, 0.01)).startswith("fires on token 5 (")


def test_chance_is_not_named() -> None:
    # 3 of 10 activations on a token of base 1%: lift 30, and yet nothing among a million pairs.
    assert label(lift(WAIT, 0.3, 0.01, count=10), count=10).startswith("no token")
    assert label(lift(WAIT, 0.3, 0.01, count=1000)).startswith('fires on " Wait"')


@pytest.mark.parametrize("seed", range(5))
def test_a_database_of_noise_names_no_token(seed: int) -> None:
    generator = np.random.default_rng(seed)
    base = generator.dirichlet(np.full(200, 0.3))
    base = base[base > 1e-9] / base[base > 1e-9].sum()
    for _ in range(200):
        n = int(generator.integers(5, 300))
        counts = generator.multinomial(n, base)
        tokens = sorted(
            (
                lift((token, f"t{token}"), count / n, base[token], n)
                for token, count in enumerate(counts)
                if count
            ),
            key=lambda t: -t.share * math.log2(t.lift),
        )
        text = label(*tokens[:3], count=n, comparisons=200 * len(base))
        assert text == "no token stands out"


@given(
    share=st.floats(0.01, 1.0),
    base=st.floats(1e-6, 0.999),
    count=st.integers(1, 10**6),
)
def test_evidence_bounds_the_binomial_tail(share: float, base: float, count: int) -> None:
    hits = max(1, round(share * count))
    token = TokenLift(0, 0, "", hits, hits / count, 0.5, base, hits / count / base)
    assert math.isfinite(token.evidence)
    assert token.evidence >= -1e-6
    if hits == count:
        # All hits: the tail is exactly base ** n.
        assert token.evidence == pytest.approx(-count * math.log2(base))


@given(
    shares=st.lists(st.floats(0.01, 1.0), min_size=0, max_size=6),
    offsets=st.lists(st.sampled_from([-1, 0, 1]), min_size=6, max_size=6),
    count=st.integers(0, 500),
)
def test_any_statistics_make_a_label_and_a_clarity(
    shares: list[float], offsets: list[int], count: int
) -> None:
    total = sum(shares) or 1.0
    tokens = [
        lift((i, f"t{i}"), share / max(total, 1.0), 0.01, count, offset=offset)
        for i, (share, offset) in enumerate(zip(shares, offsets, strict=False))
    ]
    text, clarity = label_of(Statistics(count, 1000, 100, tuple(tokens), ()))
    assert text
    assert text.isprintable()
    assert 0 <= clarity <= 1
