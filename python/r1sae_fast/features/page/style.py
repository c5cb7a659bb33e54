"""How pages of features look: one scoped style, no script, nothing fetched.

Colours come from the page around (``inherit``, ``currentColor``), and heat is a translucent orange,
so that text stays readable on white and on black without knowing which it is.
"""

from __future__ import annotations

from html import escape

from r1sae_fast.features.text import brief

_RULES = (
    (
        "",
        "font:14px/1.5 system-ui,sans-serif;color:inherit;background:transparent;max-width:72em;"
        "text-align:left",
    ),
    (
        " table",
        "border-collapse:collapse;margin:.4em 0;color:inherit;background:transparent;"
        "font-size:13px",
    ),
    (
        " td,.r1-page th",
        "padding:.2em .7em;border:0;background:transparent;vertical-align:top;color:inherit",
    ),
    (" thead th", "border-bottom:1px solid currentColor;font-weight:600;white-space:nowrap"),
    (" tbody tr", "border-bottom:1px solid rgba(128,128,128,.25);background:transparent"),
    (" .r1-n", "text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap"),
    (" .r1-t", "text-align:left;overflow-wrap:anywhere"),
    (" .r1-dim", "opacity:.65"),
    (" .r1-name", "white-space:nowrap"),
    (" h3", "font-size:1.15em;margin:.3em 0;font-weight:600"),
    (" h4", "font-size:1em;margin:.9em 0 .2em;font-weight:600"),
    (" p", "margin:.2em 0"),
    (
        " .r1-text",
        "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12.5px;"
        "white-space:pre-wrap;overflow-wrap:anywhere",
    ),
    (" .r1-peak", "outline:2px solid rgba(230,90,20,.9);border-radius:2px"),
    (
        " .r1-segment",
        "font-size:10px;opacity:.7;border:1px solid currentColor;border-radius:3px;"
        "padding:0 .3em;margin:0 .3em;vertical-align:1px",
    ),
    (" .r1-columns", "display:flex;flex-wrap:wrap;gap:0 2.5em"),
    (" svg", "color:inherit;max-width:100%"),
)
_STYLE = "".join(f".r1-page{selector}{{{rule}}}" for selector, rule in _RULES)


def escaped(text: str) -> str:
    """Text from a database for HTML: markup is text, and no control character is left."""
    return escape(brief(text), quote=True)


def framed(body: str) -> str:
    """A piece of HTML of its own, with the style."""
    return f'<div class="r1-page"><style>{_STYLE}</style>{body}</div>'
