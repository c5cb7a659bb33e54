"""What the demo shows can't harm a terminal."""

from r1sae_fast.demo.findings import Piece
from r1sae_fast.demo.show import trace_text


def test_a_trace_of_a_foreign_model_sends_no_escapes() -> None:
    pieces = [Piece("one\ntwo \x1b[31mred\x1b]0;title\x07", segment="thinking")]
    shown = trace_text(pieces).plain
    assert shown.startswith("one\ntwo ␛[31mred")
    assert not any(ord(character) < 32 and character != "\n" for character in shown)
