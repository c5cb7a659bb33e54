"""Reading answers: reasoning, markup, and answers that are none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1sae_fast.labels.answers import MAX_LABEL, read_label, read_list


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("LABEL: the word Wait", "the word Wait"),
        ("Let me see.\nLABEL: a\nNo:\nLABEL: b", "b"),
        ("<think>LABEL: draft\n</think>\n\nLABEL: the word Wait", "the word Wait"),
        ("it is LABEL: no\nLABEL: draft\n</think>\n\nLABEL: final", "final"),  # R1's template
        ("LABEL: the tag </think> that ends reasoning", "the tag </think> that ends reasoning"),
        (
            "<think>on </think> it fires</think>\nLABEL: on <think> and </think>",
            "on <think> and </think>",
        ),
        ("<THINK>LABEL: x", None),  # never came to an answer
        ("<think>LABEL: x</think>", None),
        ("**LABEL:** bold text", "bold text"),
        ("**LABEL: all of it bold**", "all of it bold"),
        ("Label: `Wait` and **so**", "`Wait` and **so**"),
        ('LABEL: "the comma"', "the comma"),
        ('LABEL: "a" or "b"', '"a" or "b"'),
        ("> label: quoted", "quoted"),
        ("LABEL: \x1b[31mred\x00[b]", "\x1b[31mred\x00[b]"),  # stored as given
        ("LABEL:", None),
        ("LABEL:   \n", None),
        ("the feature fires on commas", None),
        ("", None),
        ("LABEL: " + "x" * (MAX_LABEL + 1), None),
    ],
)
def test_labels(text: str, label: str | None) -> None:
    assert read_label(text) == label


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("[1, 0, 1]", "101"),
        ("```json\n[1,0,1]\n```", "101"),
        ("[True, false, 1]", "101"),
        ("<think>[0, 0, 0]?</think>[1, 0, 1]", "101"),
        ("[0, 0, 0]? no\n</think>\n[1, 0, 1]", "101"),
        ("first [0, 0, 0], then, on reflection, [1, 0, 1].", "101"),
        ("as passage [3] and [2, 7, 9] say: [1, 0, 1]", "101"),
        ("<think>[1, 0, 1]", None),
        ("[1, 0]", None),
        ("[1, 0, 1, 1]", None),
        ("[1, 0, 1] or rather [1, 0, 1, 1]", None),  # of another length at the end: no guess
        ("[1, 0, 2]", None),
        ("[1.0, 0, 1]", None),
        ('["1", "0", "1"]', None),
        ("[[1, 0, 1]]", "101"),
        ("1, 0, 1", None),
        ("[]", None),
        ("[" * 100_000, None),
        ("[" + "9" * 10_000 + ", 0, 1]", None),
        ("", None),
    ],
)
def test_lists(text: str, bits: str | None) -> None:
    expected = None if bits is None else tuple(bit == "1" for bit in bits)
    assert read_list(text, 3) == expected


@given(st.text(), st.integers(1, 6))
def test_nothing_raises(text: str, count: int) -> None:
    for said in (text, f"<think>{text}</think>{text}", f"LABEL: {text}", f"[{text}]"):
        label = read_label(said)
        assert label is None or 0 < len(label) <= MAX_LABEL
        bits = read_list(said, count)
        assert bits is None or len(bits) == count


@given(
    st.text(alphabet=st.characters(exclude_characters="[]")), st.lists(st.booleans(), min_size=1)
)
def test_the_list_is_found_behind_any_reasoning(thoughts: str, bits: list[bool]) -> None:
    answer = json.dumps([int(bit) for bit in bits])
    assert read_list(f"<think>{thoughts}</think>\n{answer}", len(bits)) == tuple(bits)
