"""``r1sae demo``: the whole chain on TinyR1."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Scale(str, Enum):
    """How much is done."""

    full = "full"
    test = "test"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path(
        "demo-run"
    ),
    scale: Annotated[
        Scale, typer.Option(help="full: some minutes; test: some seconds, too little to find much.")
    ] = Scale.full,
    model: Annotated[
        str, typer.Option(help="A checkpoint folder like TinyR1's; tiny-r1 is the shipped model.")
    ] = "tiny-r1",
    layer: Annotated[int | None, typer.Option(help="The block whose output is read.")] = None,
) -> None:
    """Run the whole chain on TinyR1, and show what was found.

    TinyR1 reasons; its residual stream is harvested; an SAE is trained; features are found and put
    into a database. Run again, it shows the findings at once; stopped at any point, it goes on.
    """
    from dataclasses import replace

    from r1sae_fast.demo import SCALES, run_demo

    settings = replace(SCALES[scale.value], model=model)
    if layer is not None:
        settings = replace(settings, layer=layer)
    run_demo(out, settings)


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("demo", rich_help_panel="Start here")(demo)
