"""R1's tokenizer and chat template: text and messages to token ids and back.

``tokenizer.json`` is read by the ``tokenizers`` library; ``tokenizer_config.json`` names the
special tokens and carries the chat template, as in R1's repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from r1sae_fast.errors import CheckpointError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"

CHAT_TEMPLATE = r"""
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = ns.system + ('\n\n' if ns.system else '') + message['content'] -%}
  {%- elif message['role'] not in ['user', 'assistant'] -%}
    {{- raise_exception('unknown role ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<｜Assistant｜><think>\n' -}}
{%- endif -%}
""".strip()
"""R1's chat format: no turn separators, the system text right after the first token, earlier
turns without their thinking, and the thinking opened on the model's behalf."""

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``[{"role": "user", "content": "..."}, ...]``."""


def tokenizer_config() -> dict[str, Any]:
    """A ``tokenizer_config.json`` with R1's special tokens and chat template."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "legacy": True,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class Tokenizer:
    """Text and conversations to token ids and back, as R1's own tokenizer does."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        """Wraps a loaded tokenizer with the parsed ``tokenizer_config.json``.

        Raises:
            CheckpointError: the config's bos or eos is not in the vocabulary.
        """
        self._tokenizer = tokenizer
        self._config = dict(config)
        self.bos_token, self.bos_id = self._special("bos_token", BOS)
        self.eos_token, self.eos_id = self._special("eos_token", EOS)
        self.think_id: int | None = tokenizer.token_to_id(THINK)
        self.end_think_id: int | None = tokenizer.token_to_id(END_THINK)

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> Tokenizer:
        """Reads ``tokenizer.json`` and ``tokenizer_config.json`` in ``directory``.

        Raises:
            FileNotFoundError: one of them is missing.
            CheckpointError: one of them is malformed.
        """
        directory = Path(directory)
        path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
        for needed in (path, config_path):
            if not needed.is_file():
                raise FileNotFoundError(
                    f"{needed}: no such file; the checkpoint's folder must hold its tokenizer"
                )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  # tokenizers raises nothing finer
            raise CheckpointError(f"{path}: no sound tokenizer ({error})") from None
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{config_path}: not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_path}: not a JSON object")
        template = directory / "chat_template.jinja"
        if "chat_template" not in config and template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(tokenizer, config)

    def _special(self, key: str, default: str) -> tuple[str, int]:
        value = self._config.get(key) or default
        # R1's own file writes special tokens as objects with a "content".
        token = value["content"] if isinstance(value, dict) else value
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise CheckpointError(
                f"tokenizer_config.json: {key} is {token!r}, which tokenizer.json does not know"
            )
        return token, number

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def pad_id(self) -> int:
        """The padding token's id; where there is none, that of the end of sentence."""
        return self._special("pad_token", self.eos_token)[1]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is put in front, special tokens in it count as such."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out.

        A model's embedding may be longer than its tokenizer's vocabulary (R1's is); such ids
        have no text and add nothing.
        """
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    @cached_property
    def _template(self) -> jinja2.Template:
        source = self._config.get("chat_template")
        if not isinstance(source, str):
            raise CheckpointError(
                "tokenizer_config.json has no chat_template; give token ids instead of messages"
            )
        # The template comes with the checkpoint: it may compute, but reach nothing else.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"tokenizer_config.json: chat_template: {error}") from None

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The conversation as the model reads it.

        Args:
            messages: in order, each with ``role`` (system, user, assistant) and ``content``.
            add_generation_prompt: end with the assistant's turn and an opened ``<think>``.

        Raises:
            ValueError: no messages, a message without role or content, an unknown role.
        """
        if not messages:
            raise ValueError("no messages: a conversation needs at least one")
        for number, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(
                        f"message {number} has {key} {message.get(key)!r}, expected text"
                    )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def apply_chat_template(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of :meth:`render`."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt))
