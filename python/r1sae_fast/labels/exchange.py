"""A request for a completion, and the reply to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from r1sae_fast.labels.prompts import Messages


@dataclass(frozen=True)
class Request:
    """One completion to ask for."""

    model: str
    messages: Messages
    max_tokens: int
    temperature: float = 0.0

    @property
    def key(self) -> str:
        """Tells requests apart: the same for the same request, always."""
        parts = [self.model, self.messages, self.max_tokens, self.temperature]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @property
    def text(self) -> str:
        """All that is sent, for counting tokens."""
        return "\n".join(content for _, content in self.messages)


@dataclass(frozen=True)
class Reply:
    """What came back. Tokens are None where the server doesn't count them."""

    text: str
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
