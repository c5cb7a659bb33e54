"""Text that comes a token at a time is, put together, the text."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from r1sae_fast.r1.engines.pieces import Pieces


def byte_level() -> Tokenizer:
    """Bytes, and pairs of them that cut characters anywhere."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in letters[::9] for b in letters[::7]]
    vocabulary = {token: number for number, token in enumerate([*letters, *pairs, "<think>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<think>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2's: words with a mark, bytes spelled out; the first space is dropped."""
    words = ["▁a", "▁b", "▁", "c", "d", "▁élan", "日"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def letters() -> list[str]:
    """What stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


LETTERS = letters()
TOKENIZERS = {"byte level": byte_level(), "metaspace": metaspace()}


@given(name=st.sampled_from(sorted(TOKENIZERS)), data=st.data())
def test_pieces_add_up(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token = st.integers(0, tokenizer.get_vocab_size() - 1).map(lambda number: [number])
    if name == "metaspace":
        characters = st.sampled_from("aé日🙂\n").map(
            lambda c: [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in c.encode()]
        )
        token = st.integers(0, 6).map(lambda number: [number]) | characters
    tokens = [number for part in data.draw(st.lists(token, max_size=30)) for number in part]
    stopped = data.draw(st.booleans())

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    # Byte fallback reads all bytes in a row as U+FFFD where any of them are no character.
    assume(name == "byte level" or "\ufffd" not in decode(tokens))
    pieces = Pieces(lambda ids: decode(list(ids)))
    given_ = [
        pieces.add(token, last=not stopped and place == len(tokens) - 1)
        for place, token in enumerate(tokens)
    ]
    text = "".join(given_) + (pieces.end() if stopped else "")
    assert text == decode(tokens)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20))
def test_characters_are_never_cut(text: str) -> None:
    """One token a byte: each piece is whole characters, given as soon as they are whole."""
    tokenizer = TOKENIZERS["byte level"]
    pieces = Pieces(lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)))
    for character in text:
        ids = [tokenizer.token_to_id(LETTERS[byte]) for byte in character.encode()]
        assert [pieces.add(token) for token in ids] == [""] * (len(ids) - 1) + [character]
    assert pieces.end() == ""
