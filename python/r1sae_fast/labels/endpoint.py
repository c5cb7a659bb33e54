"""Where the language model is: URL, name and key, all from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from r1sae_fast.errors import LabelError

URL, MODEL, KEY, SCORER = (
    "R1SAE_LABEL_URL",
    "R1SAE_LABEL_MODEL",
    "R1SAE_LABEL_KEY",
    "R1SAE_SCORE_MODEL",
)
"""The environment's names. They are our own: a key meant for another host is never sent."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server and the models asked there.

    Args:
        url: its base, up to and with ``/v1``: ``/chat/completions`` is added.
        model: the model that explains.
        key: sent as a bearer token; None for servers without (vLLM, llama.cpp, Ollama).
        scorer_model: the model that scores; default: the one that explains. Labellers are only
            comparable by scores that the same model gave.

    Raises:
        ValueError: not a URL of a server, or no name of a model.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    scorer_model: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"{URL} is {self.url!r}; expected the base of an OpenAI-compatible API, such as "
                "http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"{URL} has more than a base URL; the key belongs into {KEY}")
        if not self.model:
            raise ValueError(f"{MODEL} is empty; expected the model's name as the server knows it")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(f"{KEY} has characters that no key has (a line break?)")

    @property
    def chat_url(self) -> str:
        """Where requests go."""
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

    @property
    def scorer(self) -> str:
        """The name of the model that scores."""
        return self.scorer_model or self.model

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Endpoint:
        """The endpoint that the environment names.

        Raises:
            LabelError: the URL or the model is not set.
            ValueError: what is set is no endpoint.
        """
        told = {name: environment.get(name, "").strip() for name in (URL, MODEL, KEY, SCORER)}
        missing = [name for name in (URL, MODEL) if not told[name]]
        if missing:
            raise LabelError(
                f"no language model to ask: {' and '.join(missing)} not set in the environment "
                f"(an OpenAI-compatible base such as http://localhost:8000/v1, the model's name, "
                f"and {KEY} where the server wants a key); until then features keep their counted "
                "labels"
            )
        return cls(told[URL], told[MODEL], told[KEY] or None, told[SCORER] or None)
