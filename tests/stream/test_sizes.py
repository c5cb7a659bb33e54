"""Sizes as people write them."""

from __future__ import annotations

import pytest

from r1sae_fast.r1.stream.sizes import parse_size, show_size, show_time


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("700MB", 700 * 10**6),
        ("700 mb", 700 * 10**6),
        ("1.5TiB", 3 * 2**39),
        ("1e9", 10**9),
        ("64", 64),
        ("2kB", 2000),
    ],
)
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "24 GiBs", "-1GB", "0", "1..5GB", "nan", "inf", "1e999GB", "24G B"]
)
def test_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_show() -> None:
    assert show_size(406_522_447_168) == "406.5 GB"
    assert show_size(999) == "999 B"
    assert show_time(0.25) == "250 ms"
    assert show_time(3 * 86400) == "3.0 days"
