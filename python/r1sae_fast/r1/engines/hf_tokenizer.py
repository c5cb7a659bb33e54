"""A transformers tokenizer as engines want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1sae_fast.r1.chat import END_THINK, THINK, Messages


class HfTokenizer:
    """Wraps a ``PreTrainedTokenizerBase``: its own chat template, special tokens spelled out.

    Attributes:
        bos_id: None unless the tokenizer itself puts it in front of texts.
        eos_id: ends an answer.
        think_id, end_think_id: of ``<think>`` and ``</think>``, where each is one token.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises ValueError if the tokenizer has no end-of-sentence token."""
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, with which an answer would end")
        self.eos_id: int = tokenizer.eos_token_id
        ids = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self.bos_id: int | None = bos if bos is not None and ids[:1] == [bos] else None
        self.think_id = self._single(THINK)
        self.end_think_id = self._single(END_THINK)

    def _single(self, text: str) -> int | None:
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 and self.decode(ids) == text else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing put in front; special tokens in it count as such."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens spelled out."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def apply_chat_template(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation by the model's own template.

        Raises:
            ValueError: no messages, no template, or one that refuses these messages.
        """
        if not messages:
            raise ValueError("no messages: a conversation needs at least one")
        if not self.tokenizer.chat_template:
            raise ValueError(
                "this model's tokenizer has no chat template; give token ids, or raw texts in "
                "mode 'prefill'"
            )
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return self.encode(text)
