"""Text of unknown origin can't do anything to a terminal."""

import io
import re
import unicodedata
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from r1sae_fast.features.query import Frame
from r1sae_fast.features.results import ContextToken, TopExample
from r1sae_fast.features.show import heat, sparkline
from r1sae_fast.features.summary import FeatureSummary, Label
from r1sae_fast.features.text import visible
from r1sae_fast.features.view import FeatureToken, FeatureView, Interval, Related

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


def view(label: str, token: str | None = None) -> FeatureView:
    """Every place where a label or a token is shown."""
    if token is None:
        return FeatureView(summary(label), (), (), (), (), (), None)
    context = tuple(ContextToken(i, i, token, float(i), token if i else None) for i in range(3))
    examples = (TopExample(3, 1, 0, 2, 2.0, context),)
    related = (Related(4, 0.5, label, label),)
    tokens = (FeatureToken(token, 1, 0, 0.5, 2.0),)
    edges = (0.0, 1.0, 2.0, 4.0, 8.0)
    interval = (Interval(0, 0.0, 2.0, 10, examples),)
    return FeatureView(summary(label), examples, interval, tokens, related, related, edges)


def render(what: object, **options: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, **options)  # type: ignore[arg-type]  # any of its own
    console.print(what)
    return file.getvalue()


@given(TEXT, TEXT)
def test_nothing_in_a_database_reaches_the_terminal_raw(token: str, label: str) -> None:
    panel = view(label, token)
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
    shown = render(view("fires on x"), color_system=None)
    assert "fires on x  (counted)" in shown
    assert "10 tokens (10.000% of tokens)" in shown


_HARMLESS = {
    "div",
    "style",
    "h3",
    "h4",
    "p",
    "b",
    "span",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
}
_HARMLESS |= {"svg", "g", "rect", "title", "line", "text"}
_ATTRIBUTES = {"class", "style", "title", "width", "height", "role", "aria-label", "fill"}
_ATTRIBUTES |= {"x", "y", "x1", "x2", "y1", "y2", "stroke", "opacity", "font-size", "text-anchor"}


class _Reader(HTMLParser):
    """Collects what a browser would see: tags, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.styles.update(value or "" for name, value in attrs if name == "style")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


HTML_TEXT = st.one_of(
    TEXT,
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            "</style><script>",
            "\"onmouseover='x'",
            "' style='position:fixed'",
            "&lt;b&gt;",
            "]]><!--",
            "<img src=x onerror=alert(1)>",
        ]
    ),
)


@given(HTML_TEXT, HTML_TEXT)
def test_nothing_in_a_database_acts_in_a_page(token: str, label: str) -> None:
    page = _Reader(view(label, token)._repr_html_())
    assert page.tags <= _HARMLESS
    assert page.attributes <= _ATTRIBUTES
    assert all(re.fullmatch(r"background:rgba\(255,120,0,0\.\d\d\)", s) for s in page.styles)
    assert page.open == []
    assert visible(label) in page.text
    assert visible(token) in page.text
    assert not [c for c in page.text if unicodedata.category(c) in UNSAFE]


# Half of a surrogate pair can't be stored in a table.
STORED = HTML_TEXT.map(lambda text: text.encode("utf-8", "replace").decode("utf-8"))


@given(st.lists(STORED, min_size=1, max_size=3))
def test_nothing_in_a_table_acts_in_a_page(texts: list[str]) -> None:
    page = _Reader(Frame(pa.table({texts[0]: texts, "n": range(len(texts))}))._repr_html_())
    assert page.tags <= _HARMLESS
    assert page.attributes <= {"class"}
    assert all(visible(text) in page.text for text in texts)
    assert not [c for c in page.text if unicodedata.category(c) in UNSAFE]


def test_without_colour_active_tokens_stand_between_signs() -> None:
    shown = render(view("x", "tok"), color_system=None)
    assert "[tok] ‹tok›«tok»" in shown
    coloured = render(view("x", "tok"), force_terminal=True, color_system="truecolor")
    assert "‹" not in coloured
    assert "48;2;" in coloured


def test_every_width_holds_the_whole_text() -> None:
    for width in (30, 60, 200):
        file = io.StringIO()
        Console(file=file, width=width, color_system=None).print(view("a label", "tok"))
        lines = file.getvalue().splitlines()
        assert {len(line) for line in lines} == {width}
        assert "«tok»" in file.getvalue()
