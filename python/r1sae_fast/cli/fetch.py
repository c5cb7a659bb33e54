"""``r1sae fetch``: the released feature databases and SAEs."""

from pathlib import Path
from typing import Annotated

import typer


def fetch(
    name: Annotated[str, typer.Argument(help="logic or math.", show_default=False)],
    sample: Annotated[
        str,
        typer.Option(help="How much of the tokens: 0.1%, 1%, 10%, full; or none: labels alone."),
    ] = "0.1%",
    out: Annotated[Path, typer.Option(help="Folder to fetch into.")] = Path("released"),
    weights: Annotated[
        bool, typer.Option("--weights", help="Fetch the SAE's weights instead (1.2 GB).")
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="A mirror: of S3 (as does R1SAE_S3_ENDPOINT), with --weights of the hub."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Ranges to fetch at a time.")] = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are something else.")
    ] = False,
) -> None:
    """Fetch a released feature database with its labels, or an SAE.

    Size and disk are checked first. What is cut goes on where it was when run again. A database
    is queried as it is; [cyan]r1sae features import[/] makes any feature of it one short read.
    """
    from r1sae_fast.fetch import fetch_features, fetch_weights
    from r1sae_fast.r1.stream.sizes import show_size

    if weights:
        files = [fetch_weights(name, out, endpoint=endpoint)]
    else:
        part = None if sample == "none" else sample
        files = fetch_features(name, part, out, endpoint=endpoint, jobs=jobs, overwrite=overwrite)
    for file in files:
        typer.echo(f"{file}: {show_size(file.stat().st_size)}")


def register(root: typer.Typer) -> None:
    """Adds the command to the root app."""
    root.command("fetch", rich_help_panel="The chain")(fetch)
