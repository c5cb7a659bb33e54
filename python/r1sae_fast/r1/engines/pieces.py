"""Text that comes a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"


class Pieces:
    """Turns a sequence's tokens into pieces of text that together are the whole text.

    A character may take several tokens (byte-level tokenizers split UTF-8), and what a token
    reads as may depend on the one before it: a piece is given out once the tokens so far end in
    a whole character, as the difference that they make to the text. (Only where a model writes
    bytes that are no UTF-8 at all may some tokenizers read them differently in the end.)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # Decoding starts at ``_begin``, a place whose text was given out, up to ``_given``.
        self._tokens: list[int] = []
        self._begin = self._given = 0

    def add(self, token: int, *, last: bool = False) -> str:
        """The piece that ``token`` completes, often empty; with ``last``, all that is left."""
        self._tokens.append(token)
        return self._next(last)

    def end(self) -> str:
        """What is left after the last token: nothing, or an unfinished character as U+FFFD."""
        return self._next(True)

    def _next(self, last: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._given])
        after = self._decode(self._tokens[self._begin :])
        if not last and after.endswith(_UNFINISHED):
            return ""
        self._begin, self._given = self._given, len(self._tokens)
        return after[len(before) :]
