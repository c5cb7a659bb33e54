"""Results as JSON: the machine, and every contest's medians and ratios."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import machine
from harness.timing import Result
from r1sae_fast.atomic import write_bytes


def write(path: Path, results: Iterable[Result]) -> None:
    """Writes ``{"machine": ..., "when": ..., "results": [...]}``."""
    content = {
        "machine": machine.facts(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": [result.summary() for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote.

    Raises:
        ValueError: another kind of file.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not {"machine", "results"} <= content.keys():
        raise ValueError(f"{path} holds no bench results (machine, results); make it anew")
    return content
