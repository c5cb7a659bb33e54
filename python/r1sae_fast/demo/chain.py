"""Runs the stages of a demo one after the other, leaving out those that are finished."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from r1sae_fast.demo import stages
from r1sae_fast.demo.display import Display, Report, Stopwatch
from r1sae_fast.demo.findings import Findings
from r1sae_fast.demo.settings import DemoSettings
from r1sae_fast.demo.show import show_findings, show_header
from r1sae_fast.demo.stages import Demo
from r1sae_fast.demo.state import State, demo_folder
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.engines.base import fingerprint, resolve_checkpoint

# Name, what is being done, the stage.
STAGES: list[tuple[str, str, Callable[[Demo, Report], str]]] = [
    ("reason", "TinyR1 thinks", stages.stage_reason),
    ("harvest", "reading the residual stream", stages.stage_harvest),
    ("train", "training the SAE", stages.stage_train),
    ("encode", "encoding", stages.stage_encode),
    ("examples", "collecting examples", stages.stage_examples),
    ("features", "building the database", stages.stage_features),
    ("report", "finding out", stages.stage_report),
]


def run_demo(
    out: str | os.PathLike[str] = "demo-run",
    settings: DemoSettings | None = None,
    *,
    console: Console | None = None,
) -> Findings:
    """Runs what is left of the demo in ``out``, and shows what it found.

    Run again, it leaves out the stages that are finished; killed at any point, it goes on within
    the stage that it was in.

    Args:
        out: the folder; new, empty, or of a demo with the same settings and the same model.
        settings: default the full size.
        console: where to write; default stdout.

    Returns:
        Everything that is shown, as in ``summary.json``.

    Raises:
        FileExistsError: the folder holds other things.
        FileNotFoundError: no such model.
        ValueError: settings out of their range, or the folder's demo was begun with other settings
            or another model.
        ShardError: another process runs a demo in the folder.
    """
    settings = DemoSettings() if settings is None else settings
    console = Console() if console is None else console
    folder = Path(out)
    watch = Stopwatch()
    checkpoint = resolve_checkpoint(settings.model)
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no checkpoint (it has no config.json); give a folder like TinyR1's"
        )
    settings.check(R1Config.from_file(checkpoint / "config.json").num_hidden_layers)
    identity = {**settings.to_dict(), "model_fingerprint": fingerprint(checkpoint)}
    with demo_folder(folder):
        state = State(folder, identity)
        demo = Demo(settings, folder)
        show_header(console, demo)
        display = Display(console, len(STAGES))
        for name, what, run in STAGES:
            if name in state.finished:
                was = state.finished[name]
                display.skipped()
                display.finished(name, was["said"], was["seconds"], before=True)
                continue
            stage_watch = Stopwatch()
            with display.stage(what) as report:
                said = run(demo, report)
            seconds = stage_watch.seconds
            state.finish(name, seconds, said)
            display.finished(name, said, seconds, before=False)
        findings = Findings.load(demo.summary)
    show_findings(console, findings, demo, watch.seconds)
    return findings
