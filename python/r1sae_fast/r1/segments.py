"""Which part of a conversation each token belongs to: prompt, thinking or response."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Segment(IntEnum):
    """Values of the ``segment`` column of shards."""

    PROMPT = 0
    THINKING = 1
    RESPONSE = 2
    UNKNOWN = 255


def segments(
    tokens: Sequence[int],
    *,
    think_id: int | None,
    end_think_id: int | None,
    prompt_length: int | None = None,
) -> list[int]:
    """The :class:`Segment` of each token.

    Thinking runs from ``<think>`` to ``</think>``, both included; what precedes it is the
    prompt, what follows it the response. Where the prompt's length is known, a ``<think>`` in it
    counts only if it is left open there (a user may well write about ``<think>``). A sequence
    in which neither the tag nor the prompt's length is to be found is unknown throughout.

    Args:
        tokens: ids of the whole sequence.
        think_id: id of ``<think>``, None where the vocabulary has none.
        end_think_id: id of ``</think>``, likewise.
        prompt_length: number of tokens that the model did not write.
    """
    count = len(tokens)
    prompt, thinking, response, unknown = (int(s) for s in Segment)

    def find(wanted: int | None, start: int, stop: int) -> int | None:
        found = (i for i in range(start, stop) if tokens[i] == wanted)
        return None if wanted is None else next(found, None)

    if prompt_length is None:
        begin = find(think_id, 0, count)
        if begin is None:
            return [unknown] * count
    else:
        opened = next((i for i in reversed(range(prompt_length)) if tokens[i] == think_id), None)
        if opened is not None and find(end_think_id, opened, prompt_length) is None:
            begin = opened
        else:
            begin = find(think_id, prompt_length, count)
        if begin is None:
            if find(end_think_id, prompt_length, count) is None:
                # The model answered without thinking.
                return [prompt] * prompt_length + [response] * (count - prompt_length)
            begin = prompt_length
    end = find(end_think_id, begin, count)
    stop = count if end is None else end + 1
    return [prompt] * begin + [thinking] * (stop - begin) + [response] * (count - stop)
