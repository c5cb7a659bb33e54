"""Text of unknown origin can't do anything to a terminal."""

import io
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from r1sae_fast.features.results import ContextToken, TopExample
from r1sae_fast.features.show import feature_panel, heat, sparkline
from r1sae_fast.features.summary import FeatureSummary, Label
from r1sae_fast.features.text import visible

UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
TEXT = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\x00\x07\x08\x0d\x1b\x7f\x80\x9b\x9d\u200b\u202e\u2028\u2066\ufeff\ue000"),
    ),
    max_size=20,
)


@given(TEXT)
def test_everything_visible_prints_as_itself(text: str) -> None:
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in UNSAFE]
    assert visible(shown) == shown
    kept = [c for c in text if unicodedata.category(c) not in UNSAFE]
    remaining = iter(shown)
    assert all(c in remaining for c in kept)  # in their order


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Wait", " Wait"),
        ("a\nb\tc", "a↵b⇥c"),
        ("\x1b[2J", "␛[2J"),
        ("\x7f", "␡"),
        ("\x9b31m", "⟨U+009B⟩31m"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("é 漢 ∑ \\frac", "é 漢 ∑ \\frac"),
    ],
)
def test_examples(text: str, shown: str) -> None:
    assert visible(text) == shown


def summary(label: str) -> FeatureSummary:
    labels = (Label(label, None, None, "statistics", "token-lift-1"), Label(label, 1, 1, label, ""))
    densities = {"prompt": 0.1, "thinking": 0.2, "response": None}
    return FeatureSummary(3, 10, 0.1, 1.0, 2.0, (0, 4, 6, 0), densities, 0.5, labels)


def render(what: object, **options: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, **options)  # type: ignore[arg-type]  # any of its own
    console.print(what)
    return file.getvalue()


@given(TEXT, TEXT)
def test_nothing_in_a_database_reaches_the_terminal_raw(token: str, label: str) -> None:
    context = tuple(ContextToken(i, i, token, float(i), "prompt") for i in range(3))
    panel = feature_panel(summary(label), [TopExample(3, 1, 0, 2, 2.0, context)], (0, 1, 2, 4, 8))
    plain = render(panel, color_system=None)
    assert {c for c in plain if unicodedata.category(c) in UNSAFE} <= {"\n"}
    coloured = render(panel, force_terminal=True, color_system="truecolor")
    # Only rich's own colours: CSI numbers m.
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert {c for c in without_colours if unicodedata.category(c) in UNSAFE} <= {"\n"}


def test_markup_in_tokens_is_text() -> None:
    context = (ContextToken(0, 0, "[red]", 1.0, None), ContextToken(1, 1, "[/]", 0.0, None))
    assert heat(TopExample(0, 1, 0, 0, 1.0, context), 1.0).plain == "«[red]»[/]"


def test_heat_grows_with_strength() -> None:
    context = tuple(ContextToken(i, i, "x", i / 4, None) for i in range(5))
    text = heat(TopExample(0, 1, 0, 4, 1.0, context), 1.0)
    styles = [str(span.style) for span in text.spans]
    assert len(set(styles)) == 4  # the first token is not active, so it has none
    assert all("on #" in style for style in styles)


def test_sparkline() -> None:
    assert sparkline([0, 1, 0, 8, 4, 0], [1, 2, 3, 4, 5, 6, 7]) == "2 ▁ █▄ 6"
    assert sparkline([0, 0], [1, 2, 3]) == ""


def test_a_panel_says_what_counted_means() -> None:
    shown = render(feature_panel(summary("fires on x"), [], None), color_system=None)
    assert "fires on x  (counted)" in shown
    assert "10 tokens (10.000% of tokens)" in shown
