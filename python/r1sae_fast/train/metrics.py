"""The figures of a run, one JSON object a line, in step with the checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1sae_fast.atomic import write_bytes
from r1sae_fast.train.clock import PARTS

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Metrics:
    """Figures of one step; means since the line before, where they vary from step to step."""

    step: int
    """Steps done."""
    tokens: int
    """Rows trained on so far."""
    loss: float
    """Squared error per (standardised) activation number."""
    aux_loss: float
    """Share of the leftover that the dead features fail to explain; 0 without dead features."""
    fvu: float
    """Fraction of variance unexplained, over the batches that vary; NaN (null in the file) if none
    did, as with batches of one row."""
    l0: float
    """Codes a row."""
    dead_fraction: float
    """Features that have not fired for ``dead_after_tokens``."""
    threshold: float
    """Of the SAE if it were saved now, in the units of the activations' codes."""
    learning_rate: float
    left_out: int
    """Outlier rows left out so far."""
    tokens_per_second: float
    data_share: float
    """Of the time since the line before: waiting for rows; see :mod:`r1sae_fast.train.clock`."""
    forward_share: float
    backward_share: float
    optimizer_share: float


class MetricsFile:
    """Appends to ``metrics.jsonl``; lines after the step that a run resumes from are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / FILE
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_bytes(self.path, "".join(map(_to_json, kept)).encode())

    def append(self, metrics: Metrics) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_to_json(asdict(metrics)))


def _to_json(line: Mapping[str, Any]) -> str:
    """A line of the file; JSON knows no NaN and no infinity, they become null."""
    fields = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
    return json.dumps(fields, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none where there is no file. A last line that was cut in
    half by a crash is passed over. ``fvu`` may be None."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if isinstance(fields, dict) and isinstance(fields.get("step"), int):
            lines.append(fields)
    return lines


def time_shares(lines: list[dict[str, Any]]) -> dict[str, float] | None:
    """Where the time of a run went, by part; None where its lines do not tell."""
    seconds, spent, tokens = 0.0, dict.fromkeys(PARTS, 0.0), 0
    for line in lines:
        done, tokens = line["tokens"] - tokens, line["tokens"]
        if not line.get("tokens_per_second") or f"{PARTS[0]}_share" not in line:
            continue
        took = done / line["tokens_per_second"]
        seconds += took
        for part in PARTS:
            spent[part] += took * line[f"{part}_share"]
    return {part: of / seconds for part, of in spent.items()} if seconds else None
