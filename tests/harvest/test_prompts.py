"""Files of prompts: every form, and every malformed line by its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1sae_fast.prompts import read_prompts


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes('What is 1 plus 1?\r\n\n  indented é \n{"text": 1}'.encode())
    assert list(read_prompts(path)) == ["What is 1 plus 1?", "  indented é ", '{"text": 1}']


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    values = [
        "plain",
        {"text": "plain", "source": 7},
        {"prompt": "q"},
        {"prompt": "q", "response": "a"},
        {"messages": [user, assistant]},
        {"tokens": [0, 3, 9]},
    ]
    path.write_text("\n\n".join(map(json.dumps, values)))
    assert list(read_prompts(path)) == [
        "plain",
        "plain",
        [user],
        [user, assistant],
        [user, assistant],
        [0, 3, 9],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("7", "found '7'"),
        ("{}", "expected a text"),
        ('{"question": "q"}', "question"),
        ('{"prompt": "q", "response": 3}', "expected a text"),
        ('{"messages": []}', "expected a text"),
        ('{"messages": [{"role": "user"}]}', "expected a text"),
        ('{"messages": "hello"}', "expected a text"),
        ('{"tokens": [1, 2.5]}', "expected a text"),
        ('{"tokens": [true]}', "expected a text"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'"good"\n\n{line}\n')
    entries = read_prompts(path)
    assert next(entries) == "good"
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{message}"):
        next(entries)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        read_prompts(tmp_path / "no.txt")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: .*\.jsonl"):
        read_prompts(tmp_path / "a.csv")
    (tmp_path / "b.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"b\.txt, after line \d: not UTF-8"):
        list(read_prompts(tmp_path / "b.txt"))
