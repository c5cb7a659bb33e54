"""TinyR1's tokenizer: R1's kind (byte-level BPE, R1's special tokens), a few hundred tokens.

The vocabulary is every byte plus every word of TinyR1's world, whole; other text falls back to
bytes. Unlike R1's, a number carries the space before it, which halves the tokens of arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from r1sae_fast.r1.chat import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    PAD,
    THINK,
    USER,
    tokenizer_config,
)
from r1sae_fast.tiny_r1.problems import DAYS, NAMES, OBJECTS

SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)

# Words without a space before them (they open a paragraph), then words with one.
_OPENING = ("A", "First", "Okay", "Start", "The", "Today", "What")
_INNER = (
    "Check Compare How It Next On So Wait What add after and answer asked away back buys clock "
    "come comes day days does gives has have hours how in is it later leaves many me minus more "
    "on or plus result show shows so start take that the then times to user was what which with "
    "wrong"
)
_MARKS = [".", ",", "?", ":", ".\n", ".\n\n", "\n", "\n\n"]

# R1's own split, but for the optional space before a number.
_NUMBER = r" ?\p{N}{1,3}"
_WORD = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words() -> list[str]:
    """Every whole-word token, in the order of their ids."""
    spaced = sorted({*_INNER.split(), *NAMES, *OBJECTS, *DAYS})
    return [
        *_MARKS,
        *(f" {number}" for number in range(100)),
        *_OPENING,
        *NAMES,
        *(f" {word}" for word in spaced),
    ]


def build() -> Tokenizer:
    """The tokenizer, made from nothing but this file."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    for word in words():
        key = "".join(piece for piece, _ in byte_level.pre_tokenize_str(word))
        vocabulary.setdefault(key, len(vocabulary))
    # Words are looked up whole (ignore_merges), so that no merges are needed.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{_NUMBER}|{_WORD}"), "isolated"),
            byte_level,
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def write(directory: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``directory``."""
    tokenizer = build().to_str(pretty=True) + "\n"
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    text = json.dumps(tokenizer_config(), ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
