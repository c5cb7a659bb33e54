"""``r1sae curves``: a picture of training runs."""

from pathlib import Path
from typing import Annotated

import typer


def curves(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, finished or not, as r1sae train writes.")
    ],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("curves.png"),
    watch: Annotated[
        float | None, typer.Option(help="Draw it again every so many seconds, until ctrl-c.")
    ] = None,
) -> None:
    """Draw FVU, L0, dead features, rates and speed of training runs as one PNG."""
    import time

    from r1sae_fast.train.curves import draw_curves

    if watch is not None and not watch > 0:
        raise ValueError(f"--watch is {watch:g}; expected more than 0 seconds")
    draw_curves(runs, out)
    typer.echo(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    while watch is not None:
        time.sleep(watch)
        draw_curves(runs, out)


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("curves", rich_help_panel="The chain")(curves)
