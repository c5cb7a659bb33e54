"""Showing text of unknown origin: no character may move the cursor, hide or reorder anything."""

import unicodedata
from functools import lru_cache

# Controls (an escape sequence among them), formats (bidirectional overrides, zero widths),
# surrogates, private use, unassigned, and the separators of lines and paragraphs.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SPECIAL = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}


def visible(text: str) -> str:
    """``text`` with every character that does not print as itself made visible.

    A line break becomes ↵, a tab ⇥, another ASCII control its picture (escape: ␛), any other
    unprintable character ⟨U+XXXX⟩.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def brief(text: str, most: int = 1000) -> str:
    """As :func:`visible`, cut after so many characters: nobody reads on, and a file of unknown
    origin may have megabytes there."""
    return visible(text) if len(text) <= most else f"{visible(text[:most])}…"


def _visible(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in _UNSAFE:
        return f"⟨U+{ord(character):04X}⟩"
    return character


@lru_cache(1 << 16)  # an export has the same tokens over and over
def harmless(text: str) -> str:
    """As :func:`visible`, but line breaks and tabs stay: for files that other tools show."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" else _visible(c) for c in text)


def quoted(text: str | None, token: int) -> str:
    """A token for a sentence: in quotes, or by its number where its text is unknown."""
    return f"token {token}" if text is None else f'"{brief(text, 200)}"'
