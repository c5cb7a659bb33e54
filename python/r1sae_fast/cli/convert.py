"""``r1sae convert``: a checkpoint from block fp8 to bf16, or back."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Form(str, Enum):
    """What the projections are to be stored in."""

    bf16 = "bf16"
    fp8 = "fp8"


def convert(
    source: Annotated[
        str, typer.Argument(help='Checkpoint to read: a folder, or "tiny-r1".', show_default=False)
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    to: Annotated[
        Form,
        typer.Option(
            help="bf16 is what vLLM loads on any CPU, and transformers without a GPU; "
            "fp8 is R1's own form, half the size."
        ),
    ],
) -> None:
    """Converts a DeepSeek-V3 or R1 checkpoint between block fp8 and bf16, in little memory.

    Stopped at any moment, it goes on when the same command is given again; the folder is no
    checkpoint before all of it is there.

    [dim]r1sae convert tiny-r1 tiny-r1-bf16 --to bf16[/]
    """
    from r1sae_fast.cli.inspect import size
    from r1sae_fast.progress import progress_bar
    from r1sae_fast.r1.convert import convert_checkpoint
    from r1sae_fast.r1.engines.base import resolve_checkpoint

    with progress_bar("converting", 100, unit="%") as bar:
        done = convert_checkpoint(
            resolve_checkpoint(source),
            target,
            to.value,
            progress=lambda done, total: bar(100 * done // total),
        )
    earlier = f" ({size(done.kept)} of them by an earlier run)" if done.kept else ""
    files = "1 shard" if done.shards == 1 else f"{done.shards:,} shards"
    typer.echo(f"{target}: {size(done.written + done.kept)} in {files}{earlier}")


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("convert", rich_help_panel="Models")(convert)
