"""What the demo shows can't harm a terminal, and fits into it."""

import pytest
from rich.cells import cell_len

from r1sae_fast.demo.findings import Context, Feature, Piece
from r1sae_fast.demo.show import heated, trace_text
from r1sae_fast.features.text import visible


def test_a_trace_of_a_foreign_model_sends_no_escapes() -> None:
    pieces = [Piece("one\ntwo \x1b[31mred\x1b]0;title\x07", segment="thinking")]
    shown = trace_text(pieces).plain
    assert shown.startswith("one\ntwo ␛[31mred")
    assert not any(ord(character) < 32 and character != "\n" for character in shown)


@pytest.mark.parametrize("width", [10, 20, 33, 200])
@pytest.mark.parametrize("hit", [0, 2, 5])
def test_a_context_is_cut_to_the_width_around_what_counts(width: int, hit: int) -> None:
    tokens = [" one", " two", " 3", "\n", "｜wide｜", " end"]
    context = Context(tokens=tokens, strengths=[1.0] * 6, hit=hit)
    feature = Feature(7, "label", 1.0, 10, 0.1, 1.0, [context])
    shown = heated(feature, context, width).plain
    assert f"«{visible(tokens[hit])}»" in shown
    assert cell_len(shown) <= width
    assert shown.replace("«", "").replace("»", "") in visible("".join(tokens))
    assert width < 200 or len(shown) == len("".join(tokens)) + 2
