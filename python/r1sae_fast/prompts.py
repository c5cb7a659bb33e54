"""Files of prompts or finished texts, one an entry, read as they are needed.

``.txt``: one prompt a line, empty lines skipped. ``.jsonl``: one JSON value a line, either a text
or an object with one of these sets of keys:

- ``text``: as a line of a ``.txt`` file;
- ``prompt``, and ``response`` where there is one already (R1's ``<think>`` included);
- ``messages``: a conversation, each message with ``role`` and ``content``;
- ``tokens``: token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Item = str | list[dict[str, str]] | list[int]
"""Text, a conversation, or token ids."""


def read_prompts(path: Path | str) -> Iterator[Item]:
    """The entries of a file in order; nothing is read before the first one is asked for, except
    that the file is there and of a known kind.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither ``.txt`` nor ``.jsonl``; while reading: a malformed line, named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: a file of prompts is a .txt (one prompt a line) or a .jsonl "
            "(one JSON value a line)"
        )
    return _entries(path)


def _entries(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if path.suffix == ".txt":
                    yield line.rstrip("\r\n")
                else:
                    yield _item(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {number}: not UTF-8 ({error})") from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _item(value: Any, where: str) -> Item:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        text = value.get("text", value.get("prompt"))
        if "text" in value and isinstance(text, str):
            return text
        if isinstance(text, str):
            messages = [{"role": "user", "content": text}]
            response = value.get("response")
            if response is None:
                return messages
            if isinstance(response, str):
                return [*messages, {"role": "assistant", "content": response}]
        messages = value.get("messages", [])
        if messages and isinstance(messages, list) and all(map(_is_message, messages)):
            return messages
        tokens = value.get("tokens", [])
        if tokens and isinstance(tokens, list) and all(type(token) is int for token in tokens):
            return tokens
    raise ValueError(
        f"{where}: found {str(value)[:60]!r}; expected a text, or an object with text, prompt "
        "(and response), messages (role, content) or tokens (ids)"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
