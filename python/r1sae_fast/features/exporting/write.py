"""Writing pages in each format; every file is there whole or not at all."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from r1sae_fast.atomic import write_bytes
from r1sae_fast.features.exporting import neuronpedia, saedashboard
from r1sae_fast.features.exporting.encoding import encoded
from r1sae_fast.features.exporting.logits import Logits
from r1sae_fast.features.exporting.pages import Page
from r1sae_fast.features.exporting.sae_vis import Activity, vis_data
from r1sae_fast.features.exporting.target import Target

FORMATS = ("jsonl", "neuronpedia", "saedashboard", "saevis")


def export_pages(
    batches: Iterator[list[Page]],
    folder: Path,
    kind: str,
    target: Target,
    activity: Activity,
    *,
    overwrite: bool,
    progress: Callable[[float], None],
) -> list[Path]:
    """Writes all pages; returns the files. See :meth:`FeatureDB.export_pages`."""
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder}: holds files already; choose another folder, or pass overwrite=True "
            "(--overwrite)"
        )
    written: list[Path] = []

    def put(name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        written.append(path)

    if kind == "neuronpedia":
        for name, rows in neuronpedia.about(target).items():
            put(name, lines([rows]))
    for number, batch in enumerate(batches):
        if kind == "jsonl":
            put(f"features-{number:05}.jsonl", lines(map(_plain, batch)))
        elif kind == "saedashboard":
            figures = [saedashboard.figures(page, target) for page in batch]
            add_logits(figures, activity.logits, batch)
            put(f"batch-{number}.json", saedashboard.batch(figures, batch, target))
        elif kind == "saevis":
            if any(page.contexts for page in batch):
                put(f"vis-{number}.json", encoded(vis_data(batch, activity)))
        else:
            parts = neuronpedia.batch(batch, target)
            add_logits(parts["features"], activity.logits, batch)
            for part, entries in parts.items():
                # No time in it: the same features give the same bytes.
                data = gzip.compress(lines(entries), mtime=0)
                put(f"{part}/batch-{number}.jsonl.gz", data)
        progress(len(batch))
    if not written:
        raise ValueError(
            "none of these features has an example, so there is nothing that SAEDashboard's page "
            "could show; choose others, or a larger n"
        )
    return written


def add_logits(rows: list[dict[str, Any]], logits: Logits | None, pages: list[Page]) -> None:
    """Fills in what features add to the logits, which their rows have under the same names."""
    if logits is not None:
        found = logits.shown([page.feature_id for page in pages])
        for row, one in zip(rows, found, strict=True):
            row.update(one)


def lines(rows: Iterable[Any]) -> bytes:
    """JSON lines."""
    return b"".join(encoded(row) + b"\n" for row in rows)


def _plain(page: Page) -> dict[str, Any]:
    return {
        **page.row,
        "histogram": page.histogram,
        "labels": [
            {"label": label, "model_name": model, "prompt_version": version}
            for label, model, version in page.labels
        ],
        "neighbours": [{"feature_id": f, "cosine": cosine} for f, cosine in page.neighbours],
        "contexts": [vars(context) for context in page.contexts],
    }
